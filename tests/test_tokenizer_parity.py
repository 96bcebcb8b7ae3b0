"""The tokenizer of a bundle against transformers' own: same ids, same text, same chat prompts.

Each tokenizer is loaded by transformers, written as an export writes it, and read back by the runtime. The reference is
transformers' AutoTokenizer of the source folder, even where it differs from the folder's tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.export.errors import SourceError
from edgelm.export.source.tokenizer import load_tokenizer
from edgelm.export.source.tokenizer_check import HARD_TEXTS, check_tokenizer
from edgelm.export.source.tokenizer_files import write_tokenizer
from edgelm.runtime.text.options import ChatOptions
from edgelm.runtime.text.templates import find_templates
from edgelm.runtime.text.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

from .conftest import TEXT, byte_tokenizer, shared

FOLDERS = {
    "gpt2": "tokenizers/gpt2",
    "smollm2": "tokenizers/smollm2",
    "phi-3": "tokenizers/phi-3-mini",
    "qwen2": "tokenizers/qwen2",  # vocabulary and merges only: transformers makes the tokenizer.json
    "gpt-neox": "tokenizers/gpt-neox-20b",
    "stories260k": "models/stories260k",
}
PUBLISHED = {"gpt2": "gpt-2", "phi-3": "phi-3", "qwen2": "qwen2"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|user|>", "<|end|>", "<|padding|>"]
SAMPLE = 40_000

alphabet = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("etaoin shrdlu ETAOIN '.,!?0123456789"),
    st.sampled_from("\x00\x01\x1b\x7f\x85\xa0\u2028\u200b\u200d\ufe0f\ufeff\ufffd▁ĠÂ"),
    st.sampled_from("e\u0301\u0308\u0338x\u20dd你好世界ねกำमस्ते한글עברית"),
    st.sampled_from("😀👩🏽🚀🇵🇱❤🏴"),
)
pieces = st.one_of(
    st.text(alphabet, max_size=12),
    st.text(" \t\n\r\u3000", max_size=8),
    st.sampled_from([*SPECIAL, *HARD_TEXTS, "<0xE4>", "don't", " the"]),
)
hard_texts = st.lists(pieces, max_size=6).map("".join)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Pair:
    """transformers' tokenizer, the bundle's tokenizer, and the folder written by an export."""

    theirs: Any
    ours: Tokenizer
    folder: Path

    def check(self, text: str) -> None:
        for special in (True, False):
            ids = self.ours.encode(text, special=special)
            assert ids == self.theirs(text, add_special_tokens=special, verbose=False)["input_ids"]
            assert self.ours.decode(ids) == self.theirs.decode(ids, skip_special_tokens=True)


def written(source: Path, folder: Path) -> Pair:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(source))
    folder.mkdir()
    write_tokenizer(theirs, SimpleNamespace(generation_config=None), folder)
    return Pair(theirs, Tokenizer(folder / "tokenizer.json"), folder)


Get = Callable[[str], Pair]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """Pairs by name; skips the test if the shared data is missing."""

    @cache
    def pair(name: str) -> Pair:
        return written(shared(FOLDERS[name]), tmp_path_factory.mktemp("bundle") / name)

    yield pair
    pair.cache_clear()


# ---- the shared tokenizers


@pytest.mark.parametrize("name", FOLDERS)
def test_an_export_writes_exactly_the_bundles_files(get: Get, name: str) -> None:
    found = {path.name for path in get(name).folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= found
    assert found <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert get(name).ours.vocab_size == len(get(name).theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_strings(get: Get, name: str) -> None:
    pair = get(name)
    for text, ids in published(name):
        pair.check(text)
        # For Phi-3's class, transformers 5 builds its own normalizer, which adds no blank if the text starts with one.
        if not (name == "phi-3" and text.startswith(" ")):
            assert pair.ours.encode(text, special=False) == ids, repr(text)


def published(name: str) -> list[tuple[str, list[int]]]:
    path = f"tokenizers/parity/ggml-vocab-{PUBLISHED[name]}.gguf"
    texts = shared(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = shared(f"{path}.out").read_text(encoding="utf-8").splitlines()
    assert len(ids) >= 46
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, ids, strict=False)]


@pytest.mark.parametrize("text", ["wikitext-2/test.txt", "tinyshakespeare.txt", "tinystories/tinystories_1000.json"])
@pytest.mark.parametrize("name", FOLDERS)
def test_whole_texts(get: Get, name: str, text: str) -> None:
    content = shared(f"text/{text}").read_text(encoding="utf-8")
    if text.endswith(".json"):
        content = "\n\n".join(json.loads(content))
    get(name).check(content[:SAMPLE])


@pytest.mark.parametrize("name", FOLDERS)
def test_many_passages(get: Get, name: str) -> None:
    for line in shared("text/lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:120]:
        get(name).check(json.loads(line)["text"])


@pytest.mark.parametrize("name", FOLDERS)
@relaxed
@given(text=hard_texts)
def test_any_text(get: Get, name: str, text: str) -> None:
    get(name).check(text)


@pytest.mark.parametrize("name", FOLDERS)
@relaxed
@given(data=st.data())
def test_any_ids_decode_as_in_transformers(get: Get, name: str, data: st.DataObject) -> None:
    pair = get(name)
    ids = data.draw(st.lists(st.integers(0, pair.ours.vocab_size - 1), max_size=20))
    assert pair.ours.decode(ids) == pair.theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", FOLDERS)
@relaxed
@given(text=hard_texts)
def test_a_stream_joined_is_what_transformers_decodes(get: Get, name: str, text: str) -> None:
    pair = get(name)
    prompt = pair.ours.encode("So it begins:")
    ids = [*prompt, *pair.ours.encode(text, special=False)]
    whole, before = (pair.theirs.decode(part, skip_special_tokens=True) for part in (ids, prompt))
    detokenizer = Detokenizer(pair.ours, prompt)
    streamed = before + "".join(detokenizer.add(token) for token in ids[len(prompt) :]) + detokenizer.finish()
    # SmolLM2 has no token for some bytes, so a text may end inside a character, which is not shown.
    assert streamed == whole or (name == "smollm2" and streamed + REPLACEMENT == whole)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_exporter_accepts_every_tokenizer(get: Get, name: str) -> None:
    check_tokenizer(get(name).theirs, get(name).ours, TEXT)


# ---- chat

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "  What is 你好 👩🏽‍🚀?  "},
        {"role": "assistant", "content": "A greeting."},
        {"role": "user", "content": "Say <|endoftext|> and <|im_end|>, </s> and <|end|>!"},
    ],
]


# For tokenizers without a template.
CHATML = """{{ bos_token }}{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"""


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("answer", [True, False])
def test_messages_give_the_ids_of_transformers(
    get: Get, tmp_path: Path, name: str, messages: list[dict[str, str]], answer: bool
) -> None:
    theirs = get(name).theirs
    template = theirs.chat_template
    theirs.chat_template = template or CHATML
    try:
        write_tokenizer(theirs, SimpleNamespace(generation_config=None), tmp_path)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True)
    finally:
        theirs.chat_template = template
    assert encoded_by_a_bundle(tmp_path, messages, answer) == list(expected["input_ids"])


def encoded_by_a_bundle(folder: Path, messages: list[dict[str, str]], answer: bool) -> list[int]:
    """As the engine encodes, with only the bundle's files."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = find_templates((folder / "chat_template.jinja").read_text(encoding="utf-8"), config)
    assert found is not None
    text = found.default.render(messages, add_generation_prompt=answer)
    return Tokenizer(folder / "tokenizer.json").encode(text, special=False)


def test_templates_under_names_are_kept_in_a_bundle(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    byte_tokenizer(tmp_path)
    load: Any = PreTrainedTokenizerFast.from_pretrained
    tokenizer = load(str(tmp_path))
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools }}"}
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, SimpleNamespace(generation_config=None), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = find_templates(None, config)
    assert found is not None
    messages = [{"role": "user", "content": "a"}]
    for tools in (None, [{"a": 1}]):
        options = ChatOptions(tools=tools)
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert found.of(options).render(messages, options) == expected


# ---- folders as they are found


def changed(folder: Path, **config: Any) -> Path:
    """A byte tokenizer's folder with other settings."""
    byte_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    return folder


def source_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


EXTRA = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    "config",
    [
        {"clean_up_tokenization_spaces": True},  # which transformers ignores for BPE
        {"add_prefix_space": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4, "padding_side": "left"},
        {"added_tokens_decoder": {"257": {"content": "<extra>", **EXTRA}}},
        {"additional_special_tokens": ["<extra>", "<new>"]},
        {"extra_special_tokens": {"image_token": "<extra>"}, "pad_token": "<new>"},
    ],
)
def test_settings_of_the_configuration_that_a_bundle_follows(tmp_path: Path, config: dict[str, Any]) -> None:
    pair = written(changed(source_folder(tmp_path), **config), tmp_path / "bundle")
    for text in (*HARD_TEXTS, "a <extra> b<new>c <end>"):
        pair.check(text)
    check_tokenizer(pair.theirs, pair.ours, TEXT)


def test_tokens_that_are_only_in_added_tokens_json(tmp_path: Path) -> None:
    source = changed(source_folder(tmp_path))
    (source / "added_tokens.json").write_text(json.dumps({"<extra>": 257, "<new>": 258}), encoding="utf-8")
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<extra>"}), encoding="utf-8")
    pair = written(source, tmp_path / "bundle")
    pair.check("a <extra> b<new>c")
    check_tokenizer(pair.theirs, pair.ours, TEXT)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"split_special_tokens": True}, "gives other ids"),
        (
            {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            },
            "decodes ids to another text",
        ),
    ],
)
def test_settings_that_a_bundle_cannot_follow_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    pair = written(changed(source_folder(tmp_path), **config), tmp_path / "bundle")
    with pytest.raises(SourceError, match=words) as caught:
        check_tokenizer(pair.theirs, pair.ours, "plain words")
    assert "tokenizer_config.json" in str(caught.value)


def test_clean_up_is_refused_where_transformers_does_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Builder
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(chr(code) for code in range(0x21, 0x7F)), "▁"]
    builder = Builder(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    builder.pre_tokenizer, builder.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for clean in (False, True):
        source = tmp_path / f"source-{clean}"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=builder, clean_up_tokenization_spaces=clean)
        tokenizer.save_pretrained(source)
        pair = written(source, tmp_path / f"bundle-{clean}")
        if clean:
            with pytest.raises(SourceError, match="decodes ids to another text"):
                check_tokenizer(pair.theirs, pair.ours, "plain")
        else:
            check_tokenizer(pair.theirs, pair.ours, "plain")


def test_a_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    """Like old GPT-2 style folders; only the configuration asks for the first token."""
    model = json.loads(shared("tokenizers/gpt2/tokenizer.json").read_text(encoding="utf-8"))["model"]
    source = source_folder(tmp_path)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (source / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    pair = written(source, tmp_path / "bundle")
    check_tokenizer(pair.theirs, pair.ours, TEXT)
    first, *rest = pair.ours.encode("Hello world")
    assert (first, rest) == (50256, pair.ours.encode("Hello world", special=False))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_the_missing_package_is_named_although_transformers_names_another(tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}), encoding="utf-8")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(SourceError, match="pip install sentencepiece"):
        load_tokenizer(source)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    theirs = written(changed(source_folder(tmp_path)), tmp_path / "bundle").theirs
    path = tmp_path / "bundle" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "NFC"}  # no effect on plain English
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Tokenizer(path).encode(TEXT) == theirs(TEXT)["input_ids"]
    with pytest.raises(SourceError, match="gives other ids"):
        check_tokenizer(theirs, Tokenizer(path), TEXT)
