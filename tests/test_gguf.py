"""GGUF files as sources: they are read as transformers reads them, and unreadable files are refused in one line."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import SourceError
from edgelm.export.source.finding import find_source, short_name
from edgelm.export.source.gguf_file import read_header
from edgelm.export.source.loading import describe_source, load_module
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.cli import main

from .conftest import TEXT, tiny_llama
from .gguf_files import TEMPLATE, tiny_qwen2, tiny_qwen3, wide_llama, write_gguf, write_parts

KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def transformers_reading(file: Path) -> Any:
    """The model as transformers itself reads it."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    dequantized = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=dequantized
    ).eval()


def same_weights(left: Any, right: Any) -> bool:
    import torch

    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(TEXT[:100].encode())])).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    model = wide_llama(num_hidden_layers=1)
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    ours = load_module(find_source(str(file), None))
    assert same_weights(ours, transformers_reading(file))
    if not kind.endswith("_K"):  # K-quants have random blocks
        written, read = (one.model.embed_tokens.weight.detach() for one in (model, ours))
        assert float((written - read).abs().max()) < 0.1 and not written.equal(read)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_a_float32_file_is_the_model_that_it_was_made_of(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    read = load_module(find_source(str(write_gguf(tmp_path / "model.gguf", model)), None))
    assert type(read) is type(model)
    assert logits(read).equal(logits(model))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file and its bundle."""
    folder = tmp_path_factory.mktemp("gguf")
    file = write_gguf(folder / "Tiny-Chat.Q8_0.gguf", tiny_llama(), "Q8_0", ends={"eot": 7})
    return file, export_model(ExportConfig(str(file), target="x86-cpu", scheme="fp32", out=folder / "bundle")).path


def test_a_bundle_gives_the_tokens_of_transformers_reading(exported: tuple[Path, Path]) -> None:
    import torch

    file, folder = exported
    ids = list(TEXT[:40].encode())
    theirs = transformers_reading(file).generate(
        torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=[256, 7], pad_token_id=256
    )[0, len(ids) :]
    with load(folder) as engine:
        ours = engine.generate(token_ids=ids, max_tokens=32).token_ids
    assert list(ours) == [int(token) for token in theirs if int(token) not in (256, 7)]


def test_a_bundle_says_where_it_comes_from(exported: tuple[Path, Path]) -> None:
    file, folder = exported
    manifest = Bundle.open(folder).manifest
    assert manifest.name == "Tiny-Chat.Q8_0"
    source = manifest.source
    assert (source.model, source.revision, source.license) == (str(file), None, "apache-2.0")
    assert source.architecture == "LlamaForCausalLM"
    assert set(manifest.tokens.eos) == {256, 7}, "llama.cpp ends an answer at either"
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_a_file_is_compressed(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(), "Q8_0")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[step]]\nuse = "prune-magnitude"\nratio = 0.5\n', encoding="utf-8")
    assert main(["compress", str(file), "--recipe", str(recipe), "--out", str(tmp_path / "small")]) == 0
    small = tmp_path / "small"
    assert load_module(find_source(str(small), None)).config.model_type == "llama"
    assert describe_source(str(small), small, load_module(small)).source.license == "apache-2.0"


def test_parts_are_read_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama(), "Q8_0")
    folder, scratch = tmp_path / "parts", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    parts = write_parts(folder, tiny_llama(), "Q8_0")
    assert len(parts) == 3
    for named in (folder, parts[0], parts[2]):
        file = find_source(str(named), None)
        assert file == parts[0]
    module = load_module(file)
    assert same_weights(module, load_module(find_source(str(whole), None)))
    assert not list(scratch.iterdir())
    assert describe_source(str(file), file, module).name == "model"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, tiny_llama())
    parts[1].unlink()
    for named in (tmp_path, parts[0]):
        refused(named, f"of which {parts[1]} is not there", "download it too")


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, tiny_llama())
    spoiled = [part.read_bytes() for part in parts]
    parts[1].write_bytes(spoiled[2])
    refused(tmp_path, "says that it is part 1 of 3 with 20 tensors", "with 16", "download all parts again")
    parts[2].write_bytes(spoiled[1])
    refused(tmp_path, "says that it is part 3 of 3", "is part 2 of 3", "download all parts again")


def test_a_folder_with_one_file_is_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama())
    (tmp_path / "README.md").write_text("a model", encoding="utf-8")
    assert find_source(str(tmp_path), None) == file
    write_gguf(tmp_path / "other.gguf", tiny_llama())
    refused(tmp_path, "holds 2 models (model, other)", "name one GGUF file")


def test_a_file_is_recognized_by_its_first_bytes_too(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama()).rename(tmp_path / "sha256-0123")
    assert find_source(str(file), None) == file
    assert short_name(str(file)) == "sha256-0123"


def test_names_lose_their_ending_and_their_part() -> None:
    assert short_name("models/Tiny-Q4_K_M-00001-of-00003.gguf") == "Tiny-Q4_K_M"
    assert short_name("models/Tiny.v2.gguf") == "Tiny.v2" and short_name("owner/name.v2") == "name.v2"


def test_the_scaling_of_llama_3_is_found_in_its_frequencies(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_llama(rope_parameters=rope)
    plain = 500000.0 ** -(np.arange(8) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    file = write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    read = load_module(find_source(str(file), None))
    assert float((logits(read) - logits(model)).abs().max()) < 1e-4
    other = write_gguf(tmp_path / "other.gguf", model, extra={"rope_freqs.weight": factors + 1})
    refused(other, "rope_freqs.weight", "in another way than Llama 3's", at=load_module)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling": gguf.RopeScalingType.YARN}, ("llama.rope.scaling.type 'yarn'", "Hugging Face's format")),
        ({"extra": {"rope_factors_long.weight": np.ones(8, np.float32)}}, ("rope_factors_long.weight",)),
        ({"tokenizer": False}, ("has no tokenizer", "give a GGUF file with one")),
        ({"layers": 2**31 - 1}, ("layers, more than tensors", "download it again")),
        ({"extra": {"x": np.ones(8, np.float64)}}, ("its tensor x has the type F64", "such as Q8_0")),
    ],
)
def test_bad_headers_are_refused_before_weights_are_read(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(write_gguf(tmp_path / "model.gguf", tiny_llama(), **changes), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "rwkv7"}, ("rwkv7 is not supported", "Hugging Face's format")),
        ({"architecture": "t5"}, ("an encoder and a decoder",)),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, ("leaves some out", "Hugging Face's format")),
        ({"without": ("blk.1.ffn_up.weight",)}, ("some are missing", "download it again")),
    ],
)
def test_what_transformers_cannot_read_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(write_gguf(tmp_path / "model.gguf", tiny_llama(), **changes), *words, at=load_module)


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(), tokenizer_model="rwkv")
    module = load_module(file)
    refused(file, "no tokenizer", "'rwkv'", at=lambda path: describe_source("model", path, module))


def test_the_pre_tokenizer_follows_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from edgelm.export.source.gguf import load_tokenizer

    known = load_tokenizer(write_gguf(tmp_path / "known.gguf", tiny_llama(), pre="smollm"))
    assert [piece for piece, _ in known.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")] == [
        "a", "ĠĠ", "1", "2",
    ]  # fmt: skip
    assert not caplog.records
    load_tokenizer(write_gguf(tmp_path / "new.gguf", tiny_llama(), pre="of-tomorrow"))
    assert "'of-tomorrow', is unknown" in caplog.text


def refused(place: Path, *words: str, at: Callable[[Path], Any] | None = None) -> None:
    """Finding the source, or `at` applied to it, fails with one line that has these words and the file's name."""
    with pytest.raises(SourceError) as caught:
        found = find_source(str(place), None)
        assert at is not None, "a source was found"
        at(found)
    text = str(caught.value)
    assert "\n" not in text and str(place if place.is_file() else place.name) in text
    for word in words:
        assert word in text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("whole") / "model.gguf", tiny_llama(), "Q8_0").read_bytes()


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


HUGE = 2**60
HEAD = b"GGUF" + struct.pack("<I", 3)
ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
HOSTILE = {
    "empty": (b"", "is not a GGUF file"),
    "another magic": (b"GGML" + bytes(100), "is not a GGUF file"),
    "magic alone": (b"GGUF", "cut short"),
    "version 1": (b"GGUF" + struct.pack("<IIQ", 1, 0, 0), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "little-endian"),
    "2**60 tensors": (HEAD + struct.pack("<QQ", HUGE, 0) + bytes(10**6), "speaks of"),
    "2**60 keys": (HEAD + struct.pack("<QQ", 0, HUGE) + bytes(10**6), "speaks of"),
    "a text of 2**60 bytes": (HEAD + struct.pack("<QQQ", 0, 1, HUGE) + bytes(100), "cut short"),
    "a list of 2**60 numbers": (
        HEAD + struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(100),
        "speaks of",
    ),
    "a list of 2**60 texts": (
        HEAD + struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(100),
        "speaks of",
    ),
    "a list of lists": (
        HEAD + struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(100),
        "a list of the unknown type 9",
    ),
    "an unknown type": (HEAD + struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<I", 99) + bytes(9), "type 99"),
    "a key twice": (HEAD + struct.pack("<QQ", 0, 2) + 2 * (text("a") + struct.pack("<II", 4, 1)), "twice"),
    "not UTF-8": (HEAD + struct.pack("<QQQ", 0, 1, 2) + b"\xff\xfe" + bytes(100), "not UTF-8"),
    "an alignment of 0": (
        HEAD + struct.pack("<QQ", 0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
        "alignment is 0",
    ),
    "a tensor of 2**60 dimensions": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<I", 2**31) + bytes(100),
        "dimensions",
    ),
    "a tensor of 2**60 values": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, HUGE, 0, 0) + bytes(100),
        "cut short",
    ),
    "a tensor of an unknown type": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 8, 999, 0) + bytes(100),
        "unknown quantization type 999",
    ),
    "two tensors in one place": (
        HEAD + struct.pack("<QQ", 2, 0)
        + b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in "ab") + bytes(100),
        "lies on another's place",
    ),
    "two tensors of one name": (
        HEAD + struct.pack("<QQ", 2, 0)
        + b"".join(text("a") + struct.pack("<IQIQ", 1, 8, 0, place) for place in (0, 32)) + bytes(200),
        "one name",
    ),
    "no architecture": (HEAD + struct.pack("<QQ", 0, 0), "names no architecture"),
    "nothing but an architecture": (HEAD + struct.pack("<QQ", 0, 1) + ARCHITECTURE, "has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_with_little_time_and_memory(tmp_path: Path, kind: str) -> None:
    content, words = HOSTILE[kind]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    import gguf.quants  # noqa: F401 (imported here so that its memory is not counted)

    tracemalloc.start()
    started = time.process_time()
    refused(file, words)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    refused(file, "cut short", "download it again")


def test_the_command_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole[:-1])
    write_gguf(tmp_path / "new.gguf", tiny_llama(), architecture="rwkv7")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, words in (("cut", "cut short"), ("new", "rwkv7"), ("missing", "No such file")):
        for command in (["export"], ["compress", "--recipe", "light", "--out", "out"]):
            assert main([command[0], str(tmp_path / f"{name}.gguf"), *command[1:]]) == 1
            output, errors = capsys.readouterr()
            *begun, error = errors.splitlines()
            assert output == "" and words in error
            assert begun in ([], ["load: begins"])
            assert not list(here.iterdir())


def test_headers_are_read_whole(tmp_path: Path) -> None:
    header = read_header(write_gguf(tmp_path / "model.gguf", tiny_llama(), "Q8_0"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {tensor.name: tensor.offset for tensor in header.tensors} == {
        tensor.name: tensor.data_offset for tensor in reader.tensors
    }
    assert {key: entry.value for key, entry in header.entries.items()} == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
