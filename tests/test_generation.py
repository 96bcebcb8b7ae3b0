"""Requests with settings through an engine, on fake sessions: stop strings and tokens, log-probabilities, deadlines,
sliding contexts, asyncio."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Bundle, Chunk, Completion, Engine, GenerationSettings, load
from edgelm.runtime.bundle.manifest import FileEntry
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.decoding.row import shortened
from edgelm.runtime.errors import ContextLengthError, EngineClosedError, PromptError, SettingsError
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import byte_tokenizer
from .test_decode import END, expected, fake, manifest, rule, saying

NewEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def new_engine(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> NewEngine:
    folder = tmp_path_factory.mktemp("bundle")

    def make(session: FakeSession, responses: ResponseCache | None = None, **changes: Any) -> Engine:
        return Engine(Bundle(folder, manifest(**changes)), session, tokenizer, responses)

    return make


class RandomSession(FakeSession):
    """Random logits, the same each time after the same tokens."""

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        logits = super().step(token_ids, keep)
        for row in range(keep):
            known = self.tokens[: len(self.tokens) - keep + row + 1]
            logits[row] = np.random.default_rng(known).normal(0, 2, self.vocab_size)
        return logits


def random_session() -> RandomSession:
    return RandomSession(END + 1, rule(END))


def answers(done: Completion) -> tuple[str, tuple[int, ...], str]:
    return done.text, done.token_ids, done.finish_reason


# ---- stop strings and stop tokens


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    engine = new_engine(saying(tokenizer, "p", "one\nUser: two"))
    done = engine.generate("p", stop=["\nUser:", "zzz"])
    assert answers(done) == ("one", tuple(tokenizer.encode("one")), "stop")
    assert done.stats.generated_tokens == 3
    assert answers(engine.generate("p", stop="\n")) == answers(done)


def test_the_beginning_of_a_stop_string_is_shown_once_it_cannot_become_one(
    new_engine: NewEngine, tokenizer: Tokenizer
) -> None:
    chunks = list(new_engine(saying(tokenizer, "p", "a<en!b<en")).stream("p", stop=["<end>"]))
    assert [chunk.text for chunk in chunks] == ["a", "<en!", "b", "<en"]
    assert [token for chunk in chunks for token in chunk.token_ids] == tokenizer.encode("a<en!b<en")
    assert chunks[-1].finish_reason == "stop"


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab😀", min_size=1, max_size=10),
    st.lists(st.text("ab😀", min_size=1, max_size=3), max_size=2),
    st.tuples(st.integers(0, 12), st.integers(1, 40)).map(sorted),
)
def test_ids_and_text_of_an_answer_always_match(
    new_engine: NewEngine, tokenizer: Tokenizer, text: str, stops: list[str], limits: list[int]
) -> None:
    min_tokens, max_tokens = limits
    session = saying(tokenizer, "p", text)
    chunks = list(
        new_engine(session, context_length=200).stream("p", stop=stops, max_tokens=max_tokens, min_tokens=min_tokens)
    )
    shown, ids = "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]
    assert tokenizer.decode_whole(ids)[0] == shown, "no token of this tokenizer has text on both sides of a stop"
    full = tokenizer.encode(text)
    assert ids == full[: len(ids)] or min_tokens > len(full)
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not min_tokens:
        assert not any(stop in shown for stop in stops)
        if found and max_tokens > len(full):
            assert chunks[-1].finish_reason == "stop" and len(shown) >= min(found)
        if not found:
            assert ids == full[:max_tokens]
    assert len(ids) >= min(min_tokens, max_tokens)


def test_a_stop_string_is_not_looked_for_in_the_first_min_tokens(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    engine = new_engine(saying(tokenizer, "p", "a.b.c.d"))
    assert engine.generate("p", stop=".", min_tokens=2).text == "a.b"
    assert engine.generate("p", stop=".", min_tokens=1).text == "a"


def test_a_token_that_holds_the_beginning_of_a_stop_string_is_dropped_but_its_text_in_front_is_shown(
    tmp_path: Path,
) -> None:
    """A token may contain text on both sides of the border."""
    from tokenizers import Tokenizer as Plain
    from tokenizers import decoders, models

    words = ["a", "b.\n", "\n", "c", "<unk>"]
    plain = Plain(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    plain.decoder = decoders.Fuse()
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    follow = {0: 1, 1: 2, 2: 3, 3: 3}
    session = FakeSession(END + 1, lambda tokens: follow[tokens[-1]])
    done = Engine(Bundle(tmp_path, manifest()), session, tokenizer, None).generate(token_ids=[3, 0], stop="\n\n")
    assert (done.text, done.token_ids) == ("b.", ())


def test_stop_tokens_end_the_answer_besides_the_models_own(new_engine: NewEngine) -> None:
    engine = new_engine(fake(lambda tokens: 60 + len(tokens)))
    assert engine.generate("a", stop_token_ids=[65, 63]).token_ids == (61, 62)
    assert new_engine(fake(lambda _: END)).generate("a", stop_token_ids=[65]).token_ids == ()


def with_a_special_token(tokenizer: Tokenizer) -> FakeSession:
    """Answers "p" with "a", the special token <end> (not an end token here), "é", and so on from the beginning."""
    answer = [*tokenizer.encode("a"), END, *tokenizer.encode("é")]
    return fake(lambda tokens: answer[(len(tokens) - 1) % len(answer)])


def test_special_tokens_are_shown_when_they_are_asked_for(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    engine = new_engine(with_a_special_token(tokenizer), eos=())
    for options, text in (({}, "aéaéa"), ({"special_tokens": True}, "a<end>éa<end>éa")):
        done = engine.generate("p", max_tokens=9, **options)
        assert done.text == text and len(done.token_ids) == 9
        chunks = list(engine.stream("p", max_tokens=9, **options))
        assert "".join(chunk.text for chunk in chunks) == text
    batch = engine.generate_batch(["p", "p"], max_tokens=9, special_tokens=True)
    assert [done.text for done in batch] == ["a<end>éa<end>éa"] * 2


def test_an_answer_with_and_without_special_tokens_is_cached_apart(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    cache = ResponseCache()
    engine = new_engine(with_a_special_token(tokenizer), cache, eos=())
    texts = [engine.generate("p", max_tokens=3, special_tokens=special).text for special in (False, True, False)]
    assert texts == ["a", "a<end>", "a"]


@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_stop_text_that_is_one_special_token_acts_as_its_id(
    new_engine: NewEngine, tokenizer: Tokenizer, special_tokens: bool
) -> None:
    engine = new_engine(with_a_special_token(tokenizer), eos=())
    done = engine.generate("p", max_tokens=9, stop=["zz", "<end>"], special_tokens=special_tokens)
    assert (done.text, done.finish_reason, done.token_ids) == ("a", "stop", tuple(tokenizer.encode("a")))
    banned = engine.generate("p", max_tokens=3, stop="<end>", min_tokens=3, special_tokens=special_tokens)
    assert END not in banned.token_ids
    written = new_engine(saying(tokenizer, "p", "ab")).generate("p", stop="<end>")
    assert written.text == "ab"


def test_a_stop_text_with_a_special_token_among_others_needs_their_text(
    new_engine: NewEngine, tokenizer: Tokenizer
) -> None:
    engine = new_engine(with_a_special_token(tokenizer), eos=())
    with pytest.raises(SettingsError, match="holds '<end>', a special token"):
        engine.generate("p", stop="<end>é")
    done = engine.generate("p", max_tokens=9, stop="<end>é", special_tokens=True)
    assert (done.text, done.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("keywords", [{"stop_token_ids": [END + 1]}, {"logit_bias": {END + 1: 1.0}}, {"keep": 64}])
def test_settings_beyond_the_model_are_refused_at_the_call(new_engine: NewEngine, keywords: dict[str, Any]) -> None:
    session = fake()
    if "keep" in keywords:
        keywords = {**keywords, "context_full": "slide"}
    with pytest.raises(SettingsError, match=r"256|64"):
        new_engine(session).stream("a", **keywords)
    assert session.steps == []


def test_settings_are_given_as_one_object_or_as_keywords(new_engine: NewEngine) -> None:
    engine = new_engine(random_session())
    given = GenerationSettings(max_tokens=6, temperature=2.0, seed=3)
    done = engine.generate("abc", settings=given)
    assert answers(done) == answers(engine.generate("abc", max_tokens=6, temperature=2.0, seed=3))
    assert answers(done) != answers(engine.generate("abc", settings=given, seed=4))
    with pytest.raises(SettingsError, match="did you mean 'temperature'"):
        engine.generate("abc", temprature=1)  # type: ignore[call-arg]


def test_min_tokens_keeps_the_model_from_ending_at_once(new_engine: NewEngine) -> None:
    done = new_engine(fake(lambda _: END)).generate("a", min_tokens=3)
    assert (len(done.token_ids), done.finish_reason) == (3, "stop")


# ---- sampling


def test_the_models_own_generation_config_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "max_new_tokens": 1}'
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    bundle = Bundle(tmp_path, manifest(files={"generation_config.json": FileEntry(len(text), "")}))
    done = Engine(bundle, random_session(), tokenizer, None).generate(token_ids=[5, 6], max_tokens=4)
    session = random_session()
    known = [5, 6]
    for _ in range(4):
        session.rewind(0)
        known.append(int(session.step(known).argmax()))
    assert list(done.token_ids) == known[2:]


def test_a_seed_gives_the_same_answer_whatever_is_cached(new_engine: NewEngine) -> None:
    request: dict[str, Any] = {"token_ids": [5, 6, 7], "max_tokens": 12, "temperature": 1.0, "seed": 11, "top_p": 0.9}
    engine = new_engine(random_session())
    first = engine.generate(**request)
    assert answers(engine.generate(**request)) == answers(first)
    assert answers(new_engine(random_session()).generate(**request)) == answers(first)
    assert answers(engine.generate(**{**request, "seed": 12})) != answers(first)


def test_only_deterministic_answers_are_cached_and_each_setting_is_part_of_the_request(new_engine: NewEngine) -> None:
    engine = new_engine(random_session(), ResponseCache())
    for keywords in (
        {},
        {"repetition_penalty": 2.0},
        {"logit_bias": {65: 3.0}},
        {"stop": "a"},
        {"stop_token_ids": [66]},
        {"min_tokens": 3},
        {"context_full": "slide"},
    ):
        request: dict[str, Any] = {"token_ids": [5, 6], "max_tokens": 5, **keywords}
        assert not engine.generate(**request).stats.response_cache_hit
        assert engine.generate(**request).stats.response_cache_hit
    for keywords in ({"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"logprobs": 1}):
        request = {"token_ids": [5, 6], "max_tokens": 5, **keywords}
        engine.generate(**request)
        assert not engine.generate(**request).stats.response_cache_hit


def test_penalties_change_the_answer_as_a_loop_over_transformers_does(new_engine: NewEngine) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty, known = RepetitionPenaltyLogitsProcessor(1.7), [5, 6, 7]
    session = random_session()
    for _ in range(10):
        session.rewind(0)
        scores = torch.from_numpy(session.step(known).copy())
        known.append(int(penalty(torch.tensor([known]), scores).argmax()))
    done = new_engine(random_session()).generate(token_ids=[5, 6, 7], max_tokens=10, repetition_penalty=1.7)
    assert list(done.token_ids) == known[3:]


settings_of_all_kinds = st.fixed_dictionaries(
    {"max_tokens": st.integers(4, 24)},
    optional={
        "min_tokens": st.integers(0, 4),
        "temperature": st.floats(0.1, 3),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, END), st.floats(-5, 5) | st.just(-math.inf), max_size=5),
        "stop": st.lists(st.text("abcdefgh ", min_size=1, max_size=2), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, END), max_size=4),
        "logprobs": st.integers(0, 3),
        "context_full": st.sampled_from(["stop", "slide"]),
    },
)
narrowing = st.fixed_dictionaries(
    {}, optional={"top_k": st.integers(0, 60), "top_p": st.floats(0.05, 1), "min_p": st.floats(0, 0.5)}
)


@settings(max_examples=80, deadline=None)
@given(settings_of_all_kinds, narrowing, st.integers(0, 99), st.lists(st.integers(0, 255), min_size=1, max_size=6))
def test_any_combination_of_settings_is_repeatable_and_obeyed(
    new_engine: NewEngine, chosen: dict[str, Any], narrowed: dict[str, Any], seed: int, prompt: list[int]
) -> None:
    if "temperature" in chosen:
        chosen = {**chosen, **narrowed, "seed": seed}
    engine = new_engine(random_session(), ResponseCache(), context_length=16)
    done = engine.generate(token_ids=prompt, **chosen)
    chunks = list(engine.stream(token_ids=prompt, **chosen))
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (done.text, done.finish_reason)
    fresh = new_engine(random_session(), context_length=16).generate(token_ids=prompt, **chosen)
    assert answers(fresh) == answers(done) and fresh.logprobs == done.logprobs
    assert len(done.token_ids) <= chosen["max_tokens"]
    assert not {END, *chosen.get("stop_token_ids", ())} & set(done.token_ids)
    assert not {token for token, bias in chosen.get("logit_bias", {}).items() if bias == -math.inf} & set(
        done.token_ids
    )
    if not chosen.get("min_tokens"):
        assert not any(stop in done.text for stop in chosen.get("stop", ()))
    assert (done.finish_reason == "length") <= (len(done.token_ids) == chosen["max_tokens"])
    assert (done.finish_reason == "context_full") <= (len(prompt) + len(done.token_ids) == 17)
    assert (None if done.logprobs is None else len(done.logprobs)) == (
        len(done.token_ids) if "logprobs" in chosen else None
    )


# ---- log-probabilities


def test_log_probabilities_stand_beside_their_tokens(new_engine: NewEngine) -> None:
    engine = new_engine(random_session())
    done = engine.generate(token_ids=[5, 6], max_tokens=8, logprobs=3)
    assert done.logprobs is not None
    assert [entry.token_id for entry in done.logprobs] == list(done.token_ids)
    session = random_session()
    for index, entry in enumerate(done.logprobs):
        session.rewind(0)
        logits = session.step([5, 6, *done.token_ids[:index]])[0].astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(exact[entry.token_id], abs=1e-5)
        assert [token for token, _ in entry.top] == np.argsort(-exact)[:3].tolist()
        assert entry.top[0] == (entry.token_id, entry.logprob), "greedy takes the most likely token"
    chunks = list(engine.stream(token_ids=[5, 6], max_tokens=8, logprobs=3))
    assert tuple(entry for chunk in chunks for entry in chunk.logprobs) == done.logprobs
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert engine.generate(token_ids=[5, 6], max_tokens=3).logprobs is None
    alone = engine.generate(token_ids=[5, 6], max_tokens=3, logprobs=0).logprobs
    assert alone is not None and [entry.top for entry in alone] == [()] * 3


def test_log_probabilities_of_an_answer_cut_by_a_stop_string_are_those_of_its_tokens(
    new_engine: NewEngine, tokenizer: Tokenizer
) -> None:
    done = new_engine(saying(tokenizer, "p", "abc--d")).generate("p", stop="--", logprobs=0)
    assert done.logprobs is not None
    assert [entry.token_id for entry in done.logprobs] == list(done.token_ids) == tokenizer.encode("abc")


# ---- a full context that slides


@pytest.mark.parametrize(("ids", "keep", "left"), [(7, 0, [4, 5, 6, 7]), (7, 3, [1, 2, 3, 6, 7]), (2, 0, [2])])
def test_the_older_half_behind_the_kept_tokens_is_dropped(ids: int, keep: int, left: list[int]) -> None:
    assert shortened(range(1, ids + 1), keep) == left


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(2, 12), st.integers(0, 11), st.integers(1, 60)
)
def test_a_sliding_context_goes_on_as_a_fresh_run_on_what_remains(
    new_engine: NewEngine, prompt: list[int], context: int, keep: int, max_tokens: int
) -> None:
    keep, prompt = min(keep, context - 1), prompt[:context]
    session = fake()
    done = new_engine(session, context_length=context).generate(
        token_ids=prompt, max_tokens=max_tokens, context_full="slide", keep=keep
    )
    known, answer = list(prompt), []
    while len(answer) < max_tokens:
        if len(known) > context:
            known = shortened(known, keep)
        answer += expected(known, 1, set(), rule(END))
        known.append(answer[-1])
    assert list(done.token_ids) == answer
    assert done.finish_reason == "length"
    assert max(session.length, 0) <= context


def test_kept_tokens_are_not_fed_again(new_engine: NewEngine) -> None:
    session = fake()
    new_engine(session, context_length=10).generate(
        token_ids=list(range(8)), max_tokens=4, context_full="slide", keep=4
    )
    assert session.steps[-1] != list(range(8)) and len(session.steps[-1]) <= 4
    assert session.tokens[:4] == [0, 1, 2, 3]


def test_an_end_token_at_the_border_ends_a_sliding_answer(new_engine: NewEngine) -> None:
    session = fake(lambda tokens: END if len(tokens) == 10 else 65)
    done = new_engine(session, context_length=10).generate("a" * 8, max_tokens=50, context_full="slide")
    assert answers(done) == ("bb", (65, 65), "stop")


# ---- deadlines


class SlowSession(FakeSession):
    """Each step takes a moment."""

    delay = 0.02

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        time.sleep(self.delay)
        return super().step(token_ids, keep)


def slow_session() -> SlowSession:
    return SlowSession(END + 1, lambda tokens: 65 + len(tokens) % 20)


def test_a_deadline_ends_the_answer_early(new_engine: NewEngine) -> None:
    responses = ResponseCache()
    engine = new_engine(slow_session(), responses, context_length=2_000)
    done = engine.generate("abc", max_tokens=1_500, timeout=0.3)
    assert done.finish_reason == "deadline"
    assert 0 < len(done.token_ids) < 1_500
    assert len(responses) == 0, "where it ends is random"
    whole = engine.generate("abc", max_tokens=3, timeout=60)
    assert whole.finish_reason == "length"
    assert engine.generate("abc", max_tokens=3).stats.response_cache_hit, "a deadline that is met changes nothing"


def test_a_deadline_that_passes_inside_a_prompt_ends_between_two_pieces(new_engine: NewEngine) -> None:
    session = slow_session()
    done = new_engine(session, context_length=300_000).generate(token_ids=[65] * 250_000, timeout=0.1)
    assert answers(done) == ("", (), "deadline")
    assert 0 < len(session.steps) < 900
    assert done.stats.time_to_first_token_s > 0 and done.stats.decode_tokens_per_s == 0


def test_a_text_that_is_far_too_long_is_refused_before_it_is_encoded(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(fake())

    def never(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(Tokenizer, "encode", never)
    with pytest.raises(ContextLengthError, match="2,000,000 characters, so 400,000 tokens or more"):
        engine.generate("a" * 2_000_000)


@pytest.mark.parametrize("responses", [False, True])
def test_a_deadline_holds_while_a_prompt_is_encoded(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch, responses: bool
) -> None:
    engine = new_engine(fake(), ResponseCache() if responses else None)
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *given, **named: time.sleep(1.0) or encode(*given, **named))
    started = time.perf_counter()
    done = engine.generate("ab", timeout=0.1)
    assert time.perf_counter() - started < 0.9
    assert (done.text, done.finish_reason, done.stats.prompt_tokens) == ("", "deadline", 0)
    assert engine.generate("ab", timeout=30.0, max_tokens=3).finish_reason == "length"


def test_a_deadline_counts_the_wait_for_another_request(new_engine: NewEngine) -> None:
    engine = new_engine(slow_session())
    stream = engine.stream("abc", max_tokens=60)
    next(stream)
    done = engine.generate("other", timeout=0.005)
    assert answers(done) == ("", (), "deadline")
    assert len(list(stream)) > 0


# ---- asyncio


@pytest.mark.parametrize("timeout", [1e10, 1e300])
def test_a_deadline_longer_than_threads_can_wait_counts_as_none(new_engine: NewEngine, timeout: float) -> None:
    """Two equal requests; the second shares the computation of the first."""
    engine = new_engine(fake(), ResponseCache())
    stream = engine.stream(token_ids=[1], max_tokens=8, timeout=timeout)
    answers = [next(stream)]
    waiting = ThreadPoolExecutor(1).submit(engine.generate, token_ids=[1], max_tokens=8, timeout=timeout)
    answers += stream
    assert waiting.result(10).token_ids == tuple(token for chunk in answers for token in chunk.token_ids)


def test_the_longest_timeout_allows_a_prompt_in_pieces(tiny_bundle: Path) -> None:
    """From the second prompt on, the speed is known by which a deadline limits a piece."""
    with load(tiny_bundle) as engine:
        for first in (1, 2):
            done = engine.generate(token_ids=[first] * 200, max_tokens=2, timeout=sys.float_info.max)
            assert len(done.token_ids) == 2


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"prompt": np.array(["a", "b"])}, "must be a text"),
        ({"prompt": np.array([1.5, 2.5])}, "must be a text"),
        ({"prompt": b"bytes"}, "must be a text"),
        ({"prompt": 10**5000}, "must be a text"),
        ({"token_ids": np.array([[1, 2], [3, 4]])}, "whole numbers"),
        ({"token_ids": np.array([1.0, 2.0])}, "whole numbers"),
        ({"token_ids": np.array(5)}, "whole numbers"),
        ({"token_ids": np.array([], np.int64)}, "empty"),
        ({"token_ids": [10**5000]}, "out of range"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_invalid_prompts_are_refused(new_engine: NewEngine, prompts: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        new_engine(fake()).generate(**prompts)


def test_arrays_of_ids_are_prompts(new_engine: NewEngine) -> None:
    engine = new_engine(fake())
    wanted = [engine.generate(token_ids=ids, max_tokens=3).token_ids for ids in ([1, 2], [3, 4])]
    assert engine.generate(token_ids=np.array([1, 2]), max_tokens=3).token_ids == wanted[0]  # type: ignore[arg-type]
    batch: Any = np.array([[1, 2], [3, 4]])
    assert [done.token_ids for done in engine.generate_batch(batch, max_tokens=3)] == wanted
    for wrong in (np.array(5), 10**5000, [np.array(5)], [10**5000]):
        with pytest.raises(PromptError, match="list"):
            engine.generate_batch(wrong)  # type: ignore[arg-type]
    for ids in ([10**5000], {10**5000: 1.0}):
        name = "stop_token_ids" if isinstance(ids, list) else "logit_bias"
        with pytest.raises(SettingsError, match=name):
            engine.generate("a", **{name: ids})


def test_asynchronous_requests_give_the_same_as_the_others(new_engine: NewEngine) -> None:
    engine = new_engine(random_session(), ResponseCache())

    async def ask() -> tuple[Completion, list[Chunk]]:
        done = await engine.agenerate("abc", max_tokens=8, temperature=1.0, seed=1)
        return done, [chunk async for chunk in engine.astream("abc", max_tokens=8)]

    done, chunks = asyncio.run(ask())
    assert answers(done) == answers(engine.generate("abc", max_tokens=8, temperature=1.0, seed=1))
    again = list(engine.stream("abc", max_tokens=8))
    assert [(chunk.text, chunk.token_ids) for chunk in chunks] == [(chunk.text, chunk.token_ids) for chunk in again]
    assert again[-1].stats is not None and again[-1].stats.response_cache_hit


def test_the_event_loop_stays_free_while_a_step_runs(new_engine: NewEngine) -> None:
    """The step ends only after something else has run in the loop."""
    ran = threading.Event()

    class Waiting(FakeSession):
        def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
            assert ran.wait(30)
            return super().step(token_ids, keep)

    async def ask() -> Completion:
        asyncio.get_running_loop().call_later(0.01, ran.set)
        return await new_engine(Waiting(END + 1, rule(END))).agenerate("a", max_tokens=2)

    assert len(asyncio.run(ask()).token_ids) == 2


class GatedSession(FakeSession):
    """Blocks before the step of this number until it is released."""

    def __init__(self, stop_at: int) -> None:
        super().__init__(END + 1, lambda tokens: 65 + len(tokens) % 20)
        self.stop_at = stop_at
        self.reached, self.go = threading.Event(), threading.Event()

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        if len(self.steps) == self.stop_at:
            self.reached.set()
            assert self.go.wait(30)
        return super().step(token_ids, keep)


def test_cancelling_a_task_frees_the_engine_after_the_running_step(new_engine: NewEngine) -> None:
    session = GatedSession(3)
    engine = new_engine(session, ResponseCache())

    async def ask() -> Completion:
        task = asyncio.create_task(engine.agenerate("abc", max_tokens=50))
        while not session.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        session.go.set()
        return await engine.agenerate("abc!", max_tokens=2)

    done = asyncio.run(ask())
    assert len(done.token_ids) == 2
    assert len(session.steps) == 4 + 2, "three steps, the one running when cancelled, and two of the next request"
    engine.close()
    assert session.closed


def test_a_stop_string_that_is_held_back_does_not_hinder_cancelling(new_engine: NewEngine) -> None:
    session = GatedSession(6)
    session._next_token = lambda _: 65
    engine = new_engine(session)

    async def ask() -> None:
        task = asyncio.create_task(engine.agenerate("abc", max_tokens=60, stop="b" * 100))
        while not session.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        session.go.set()

    asyncio.run(ask())
    engine.close()
    assert len(session.steps) == 7


@pytest.mark.parametrize("close", ["aclose", "break"])
def test_leaving_an_asynchronous_loop_frees_the_engine(new_engine: NewEngine, close: str) -> None:
    engine = new_engine(slow_session())

    async def ask() -> Completion:
        stream = engine.astream("abc", max_tokens=50)
        async for chunk in stream:
            assert chunk.text
            break
        if close == "aclose":
            await stream.aclose()
        else:
            del stream
        return await engine.agenerate("abcd", max_tokens=2)

    assert len(asyncio.run(ask()).token_ids) == 2
    engine.close()


def test_tasks_of_one_loop_are_all_answered(new_engine: NewEngine) -> None:
    engine = new_engine(fake())

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(engine.agenerate(token_ids=[index], max_tokens=5) for index in range(8)))

    for index, done in enumerate(asyncio.run(ask())):
        assert list(done.token_ids) == expected([index], 5, {END}, rule(END))


@pytest.mark.parametrize("seed", range(3))
def test_tasks_that_are_cancelled_anywhere_harm_no_other(new_engine: NewEngine, seed: int) -> None:
    class Yielding(FakeSession):
        """Lets the event loop run inside a step."""

        def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
            time.sleep(0.0005)
            return super().step(token_ids, keep)

    random, session = np.random.default_rng(seed), Yielding(END + 1, rule(END))
    engine = new_engine(session, ResponseCache() if seed else None)
    finished: dict[int, Completion] = {}

    async def one(index: int) -> None:
        finished[index] = await engine.agenerate(token_ids=[1, index % 7], max_tokens=6)

    async def ask() -> None:
        tasks = [asyncio.create_task(one(index)) for index in range(40)]
        for task in tasks[::2]:
            await asyncio.sleep(float(random.uniform(0, 0.004)))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask())
    assert set(range(1, 40, 2)) <= set(finished)
    for index, done in finished.items():
        assert list(done.token_ids) == expected([1, index % 7], 6, {END}, rule(END))
    engine.close()
    assert session.closed


def test_a_task_may_ask_while_it_iterates(new_engine: NewEngine) -> None:
    engine = new_engine(fake())

    async def ask() -> list[Chunk]:
        stream = engine.astream("abc", max_tokens=5)
        chunks = [await anext(stream)]
        assert (await engine.agenerate("other", max_tokens=1)).finish_reason == "length"
        assert engine.generate("another", max_tokens=1).finish_reason == "length"
        return [*chunks, *[chunk async for chunk in stream]]

    text = "".join(chunk.text for chunk in asyncio.run(ask()))
    assert text == engine.generate("abc", max_tokens=5).text


def test_errors_of_asynchronous_requests_are_raised_when_awaited(new_engine: NewEngine) -> None:
    engine = new_engine(fake())

    async def ask() -> None:
        with pytest.raises(PromptError):
            await anext(engine.astream(""))
        with pytest.raises(SettingsError):
            engine.astream("a", temperature=-1)
        with pytest.raises(SettingsError):
            await engine.agenerate("a", temperature=-1)
        with pytest.raises(SettingsError, match="no token is left"):
            await engine.agenerate("a", logit_bias=dict.fromkeys(range(END + 1), -math.inf))
        assert (await engine.agenerate("a", max_tokens=1)).finish_reason == "length"
        stream = engine.astream("a", max_tokens=1)
        engine.close()
        with pytest.raises(EngineClosedError):
            await anext(stream)

    asyncio.run(ask())
