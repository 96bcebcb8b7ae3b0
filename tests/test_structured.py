"""Answers that follow a JSON schema or a regular expression, whatever the model's logits are."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.runtime import Bundle, Engine, GenerationSettings
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.decoding.grammar import GrammarCompiler
from edgelm.runtime.errors import MissingExtraError, SettingsError
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import byte_tokenizer, shared
from .test_decode import fake, manifest
from .test_generation import random_session

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def deep_schema(depth: int) -> dict[str, Any]:
    """Deeper than parsers allow."""
    return {"properties": {"a": deep_schema(depth - 1)}} if depth else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return folder


def engine_on(folder: Path, session: FakeSession, responses: ResponseCache | None = None, **changes: Any) -> Engine:
    bundle = Bundle(folder, manifest(**{"context_length": 400, **changes}))
    return Engine(bundle, session, Tokenizer(folder / "tokenizer.json"), responses)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1_000), st.booleans())
def test_every_answer_follows_the_schema(folder: Path, seed: int, drawn: bool) -> None:
    chosen: dict[str, Any] = {"temperature": 2.0, "seed": seed} if drawn else {"logit_bias": {seed % 200: 5.0}}
    done = engine_on(folder, random_session()).generate("p", json_schema=SCHEMA, **chosen)
    assert done.finish_reason == "stop"
    data = json.loads(done.text)
    assert list(data) == ["name", "kind", "age", "tags"], "the order of the schema"
    assert isinstance(data["name"], str) and len(data["name"]) <= 5
    assert data["kind"] in ("cat", "dog")
    assert type(data["age"]) is int and 0 <= data["age"] <= 30
    assert len(data["tags"]) <= 2 and all(type(tag) is bool for tag in data["tags"])
    assert done.text.encode() == bytes(
        byte for token in done.token_ids for byte in Tokenizer(folder / "tokenizer.json")._bytes(token)
    )


BLANKS = {ord(" "): 50.0, ord("\n"): 49.0, ord("\t"): 48.0}


FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}


@pytest.mark.parametrize("schema", [{"type": "object", "properties": {"a": FLAGS}, "required": ["a"]}, FLAGS])
def test_a_model_that_prefers_blanks_cannot_write_them_endlessly(folder: Path, schema: dict[str, Any]) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    bias = {tokenizer.encode(chr(code))[0]: value for code, value in BLANKS.items()}
    session = fake(lambda _: tokenizer.encode("}")[0])
    done = engine_on(folder, session).generate("p", json_schema=schema, logit_bias=bias, max_tokens=350)
    assert done.finish_reason == "stop"
    assert json.loads(done.text) is not None and len(done.text) < 120
    own = {**schema, "x-guidance": {"whitespace_flexible": True}}
    endless = engine_on(folder, session).generate("p", json_schema=own, logit_bias=bias, max_tokens=350)
    assert endless.finish_reason == "length", "a grammar that asks for them may have any blanks"


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2]}', '{"a":[1,2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}', '{\n\t"a": [1, 2]\n}']
)
def test_the_usual_forms_of_json_are_allowed(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode(text)
    session = fake(lambda tokens: ids[min(len(tokens) - 1, len(ids) - 1)])
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    assert engine_on(folder, session).generate("p", json_schema=schema, max_tokens=60).text == text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1_000))
def test_every_answer_follows_the_expression(folder: Path, seed: int) -> None:
    pattern = r"(yes|no), [a-zé]{2,9}(!|\?)?"
    done = engine_on(folder, random_session()).generate("p", regex=pattern, temperature=3.0, seed=seed)
    assert re.fullmatch(pattern, done.text)
    assert done.finish_reason == "stop"


def test_the_most_likely_token_that_is_allowed_is_taken(folder: Path) -> None:
    text = Tokenizer(folder / "tokenizer.json").encode("xbc")
    session = fake(lambda tokens: text[min(len(tokens) - 1, 2)])
    assert engine_on(folder, session).generate("p", regex="[ab][bd][ce]").text == "abc"


def test_a_complete_answer_ends_without_a_further_step(folder: Path) -> None:
    session = random_session()
    done = engine_on(folder, session, eos=()).generate("p", regex="abc")
    assert (done.text, done.finish_reason, len(session.steps)) == ("abc", "stop", 3)


def test_max_tokens_may_cut_a_structured_answer(folder: Path) -> None:
    done = engine_on(folder, random_session()).generate("p", json_schema=SCHEMA, max_tokens=4)
    assert (done.finish_reason, done.text) == ("length", '{"na')


def test_structured_answers_are_cached_by_their_schema(folder: Path) -> None:
    engine = engine_on(folder, random_session(), ResponseCache())
    first = engine.generate("p", regex="a|b")
    assert engine.generate("p", regex="a|b").stats.response_cache_hit
    assert not engine.generate("p", regex="b|c").stats.response_cache_hit
    assert first.text in ("a", "b")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"json_schema": {"type": "nonsense"}}, "nonsense"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": {"not": {}}}, "not"),
        ({"json_schema": {"$ref": "http://example.com/schema"}}, "fetch"),
        ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "cannot be"),
        ({"json_schema": {"const": "\ud800"}}, "cannot be used"),
        ({"json_schema": deep_schema(300)}, "cannot be used"),
        ({"regex": "\ud800"}, "cannot be used"),
        ({"regex": "(ab"}, "unclosed"),
        ({"regex": "a(?=b)"}, "look"),
        ({"regex": r"[^\s\S]"}, "cannot be met"),
    ],
    ids=range(12),
)
def test_malformed_or_unsatisfiable_schemas_are_refused_at_the_call(
    folder: Path, keywords: dict[str, Any], words: str
) -> None:
    session = random_session()
    with pytest.raises(SettingsError, match=words):
        engine_on(folder, session).stream("p", **keywords)
    assert session.steps == []


@pytest.mark.parametrize(
    "asked",
    [
        {"json_schema": {"enum": [-(2**63)]}},
        {"json_schema": {"properties": {"a": {"anyOf": [{"const": -9223372036854775708}]}}}},
        {"json_schema": {"type": "integer", "minimum": 1 - 2**63, "maximum": 3 - 2**63}},
        {"lark": 'start: %json {"const": -9223372036854775708}'},
    ],
)
def test_integers_that_overflow_llguidances_stack_are_refused(folder: Path, asked: dict[str, Any]) -> None:
    """Any of them ended the process with SIGSEGV, llguidance 1.9.1."""
    with pytest.raises(SettingsError, match="integer below -9"):
        engine_on(folder, fake()).generate("a", max_tokens=2, **asked)


def test_integers_near_the_limit_are_allowed(folder: Path) -> None:
    for number in (-9 * 10**18, 2**63 - 1, -(10**18)):
        assert engine_on(folder, fake()).generate("a", max_tokens=1, json_schema={"const": number}).token_ids


def test_an_expression_with_a_dead_end_is_an_error_and_no_wrong_answer(folder: Path) -> None:
    engine = engine_on(folder, random_session())
    with pytest.raises(SettingsError, match="cannot be met"):
        engine.generate("p", regex=r"ab*[^\s\S]")
    assert engine.generate("p", regex="ab").text == "ab"


def test_a_model_without_the_needed_tokens_is_an_error(folder: Path) -> None:
    bias = {token: -float("inf") for token in Tokenizer(folder / "tokenizer.json").encode("{")}
    with pytest.raises(SettingsError, match="no token is left"):
        engine_on(folder, random_session()).generate("p", json_schema=SCHEMA, logit_bias=bias)


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "phi-3-mini", "gpt-neox-20b"])
def test_real_vocabularies_follow_the_schema(name: str) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    import numpy as np

    from edgelm.runtime.decoding.grammar import GrammarCompiler
    from edgelm.runtime.settings import GenerationSettings
    from edgelm.runtime.text.tokenizer import Detokenizer

    folder = shared(f"tokenizers/{name}")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    shape = manifest(eos=(0,))
    padded = tokenizer.vocab_size + 40
    model = type(shape.model)(padded, 512, 0, shape.model.layers, shape.model.kv)
    bundle = Bundle(folder, type(shape)(**{**vars(shape), "model": model}))
    grammar = GrammarCompiler(bundle).compile(GenerationSettings(json_schema=SCHEMA))
    assert grammar is not None
    detokenizer, random, text = Detokenizer(tokenizer, tokenizer.encode("p")), np.random.default_rng(1), ""
    while not grammar.finished:
        allowed = np.flatnonzero(grammar.allowed())
        assert allowed.max() < tokenizer.vocab_size
        token = int(random.choice(allowed))
        if token == 0:
            break
        grammar.accept(token)
        text += detokenizer.add(token)
    assert set(json.loads(text)) == {"name", "kind", "age", "tags"}


def test_without_the_extra_the_pip_command_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edgelm\[structured\]"'):
        engine_on(folder, random_session()).generate("p", regex="a")


def test_a_grammar_may_hold_free_text_that_a_stop_text_ends(folder: Path) -> None:
    lark = '%llguidance {}\nstart: "yes" | TEXT\nTEXT: /[a-z ]*!/'
    (z,) = Tokenizer(folder / "tokenizer.json").encode("z")
    engine = engine_on(folder, fake(lambda _: z))
    assert set(engine.generate("a", lark=lark, max_tokens=20).text) == {"z"}
    assert engine.generate("a", lark=lark, max_tokens=20, stop=["zzz"]).text == ""
    with pytest.raises(SettingsError, match="lark cannot be used"):
        engine.generate("a", lark="start: (")
    with pytest.raises(SettingsError, match="regex and lark were both given"):
        engine.generate("a", lark=lark, regex="a")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_a_vocabulary_is_prepared_compiles(tiny_bundle: Path) -> None:
    compiler = GrammarCompiler(Bundle.open(tiny_bundle))
    with compiler._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if compiler.compile(GenerationSettings(regex="a+")) is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
