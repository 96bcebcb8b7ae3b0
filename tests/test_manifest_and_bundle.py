"""manifest.json and the bundle around it: exact round trip, strict reading, digests, every kind of damage.

A damaged bundle must be refused by the right exception of edgelm with the file's name, and without a traceback on the
command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.runtime import Bundle, load
from edgelm.runtime.bundle.folder import file_digest
from edgelm.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    CacheType,
    Exclusion,
    FileEntry,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Source,
    Target,
    Tokens,
    parse_manifest,
)
from edgelm.runtime.cli import main
from edgelm.runtime.errors import BundleCorruptError, BundleError, BundleMissingError, BundleVersionError, EdgelmError

MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    name="małe",
    source=Source("someone/model", "0123abc", "LlamaForCausalLM", None),
    target=Target("x86-cpu", {"opset": 20, "gate": {"limit": 0.5}, "machines": ["a", "b"], "nothing": None}),
    compression=({"step": "prune", "ratio": 0.25}, {"step": "factor"}),
    quantization=Quantization("int8-rowwise", (Exclusion("lm_head", "too large an error"),), {"mlp": 8, "head": 16}),
    model=Model(
        257, 512, 1_000, (LayerCache(2, 16, 8, None), None, LayerCache(1, 4, 4, 128)), CacheType("int8", "channel")
    ),
    tokens=Tokens(None, (2, 3), 0),
    quality={"against_source": {"near_ties": 0}},
    files={"model.onnx": FileEntry(10, "sha256:" + "a" * 64), "tokenizer.json": FileEntry(2, "sha256:" + "b" * 64)},
    versions={"edgelm": "0.1.0"},
)

Change = Callable[[dict[str, Any]], None]

# Every object of the manifest: the keys and indices that lead to it, and its name in error messages.
OBJECTS: list[tuple[tuple[str | int, ...], str]] = [
    ((), ""),
    (("source",), "source"),
    (("target",), "target"),
    (("quantization",), "quantization"),
    (("quantization", "excluded", 0), "quantization.excluded[0]"),
    (("model",), "model"),
    (("model", "layers", 2), "model.layers[2]"),
    (("model", "kv"), "model.kv"),
    (("tokens",), "tokens"),
    (("files", "model.onnx"), "files.model.onnx"),
]
WRONG_TYPES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("name",), 5, "name"),
    (("name",), None, "name"),
    (("source",), [], "source"),
    (("source", "model"), None, "source.model"),
    (("source", "revision"), 7, "source.revision"),
    (("target", "settings"), [], "target.settings"),
    (("compression",), {}, "compression"),
    (("compression", 0), "prune", "compression[0]"),
    (("quantization", "excluded"), None, "quantization.excluded"),
    (("quantization", "activations"), [], "quantization.activations"),
    (("quantization", "activations", "mlp"), 4, "quantization.activations.mlp"),
    (("model", "vocab_size"), "257", "model.vocab_size"),
    (("model", "vocab_size"), 257.0, "model.vocab_size"),
    (("model", "vocab_size"), True, "model.vocab_size"),
    (("model", "layers"), {}, "model.layers"),
    (("model", "layers", 0), 4, "model.layers[0]"),
    (("model", "layers", 0, "window"), "all", "model.layers[0].window"),
    (("tokens", "eos"), 2, "tokens.eos"),
    (("tokens", "eos", 1), "</s>", "tokens.eos[1]"),
    (("tokens", "bos"), False, "tokens.bos"),
    (("files",), [], "files"),
    (("files", "model.onnx"), 10, "files.model.onnx"),
    (("files", "model.onnx", "bytes"), "10", "files.model.onnx.bytes"),
    (("versions", "edgelm"), 1, "versions.edgelm"),
]


def as_data(manifest: Manifest = MANIFEST) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(manifest.to_json())
    return data


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


def test_round_trip_is_exact() -> None:
    text = MANIFEST.to_json()
    assert parse_manifest(text) == MANIFEST
    assert parse_manifest(text).to_json() == text
    assert text.endswith("}\n") and not text.endswith("\n\n")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(value: str) -> None:
    data = {**as_data(), "quality": {"against_fp32": {"perplexity": 1.5}}}
    assert parse_manifest(json.dumps(data)).quality == data["quality"]
    with pytest.raises(BundleCorruptError, match=value):
        parse_manifest(json.dumps(data).replace("1.5", value))


numbers = st.integers(0, 2**40)
words = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=8)
sizes = st.integers(1, 2**40)
layers = st.builds(LayerCache, sizes, sizes, sizes, st.none() | sizes)
manifests = st.builds(
    Manifest,
    schema_version=st.just(SCHEMA_VERSION),
    name=words,
    source=st.builds(Source, words, st.none() | words, words, st.none() | words),
    target=st.builds(Target, words, st.dictionaries(words, numbers | words | st.lists(words, max_size=2), max_size=3)),
    compression=st.lists(st.dictionaries(words, numbers, max_size=2), max_size=2).map(tuple),
    quantization=st.builds(
        Quantization,
        words,
        st.lists(st.builds(Exclusion, words, words), max_size=2).map(tuple),
        st.dictionaries(words, st.sampled_from([8, 16]), max_size=2),
    ),
    model=st.builds(
        Model,
        sizes,
        sizes,
        numbers,
        st.lists(st.none() | layers, max_size=3).map(tuple),
        st.builds(CacheType, st.sampled_from(["int8", "float32"]), st.none() | st.just("channel")),
    ),
    tokens=st.builds(Tokens, st.none() | numbers, st.lists(numbers, max_size=3).map(tuple), st.none() | numbers),
    quality=st.dictionaries(words, numbers, max_size=2),
    files=st.dictionaries(words, st.builds(FileEntry, numbers, words), max_size=3),
    versions=st.dictionaries(words, words, max_size=2),
)


@settings(max_examples=50, deadline=None)
@given(manifests)
def test_any_manifest_survives_the_round_trip(manifest: Manifest) -> None:
    again = parse_manifest(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest


@pytest.mark.parametrize(("path", "name"), OBJECTS)
def test_an_unknown_key_is_refused_and_named(path: tuple[str | int, ...], name: str) -> None:
    data = as_data()
    at(data, path)["surprise"] = 1
    with pytest.raises(BundleCorruptError) as caught:
        parse_manifest(json.dumps(data))
    assert f"{name}.surprise".removeprefix(".") in str(caught.value)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(("path", "name"), OBJECTS)
def test_each_missing_key_is_refused_and_named(path: tuple[str | int, ...], name: str) -> None:
    optional = {("schema_version",), ("quantization", "activations"), ("quantization", "weights"), ("notes",)}
    for key in [key for key in at(as_data(), path) if (*path, key) not in optional]:
        data = as_data()
        del at(data, path)[key]
        with pytest.raises(BundleCorruptError) as caught:
            parse_manifest(json.dumps(data))
        assert f"{name}.{key}".removeprefix(".") in str(caught.value)


def test_manifests_from_before_16_bit_activations_are_read() -> None:
    data = as_data()
    del data["quantization"]["activations"]
    assert parse_manifest(json.dumps(data)).quantization.activations == {}


@pytest.mark.parametrize(("path", "value", "name"), WRONG_TYPES)
def test_a_wrong_type_is_refused_and_named(path: tuple[str | int, ...], value: Any, name: str) -> None:
    data = as_data()
    at(data, path[:-1])[path[-1]] = value
    with pytest.raises(BundleCorruptError) as caught:
        parse_manifest(json.dumps(data))
    assert f" {name} must be " in str(caught.value)
    assert repr(value)[:20] in str(caught.value)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, SCHEMA_VERSION + 1000])
def test_another_schema_version_is_refused_before_anything_else_is_read(version: int) -> None:
    with pytest.raises(BundleVersionError) as caught:
        parse_manifest(json.dumps({"schema_version": version, "layout": "unknown to us"}))
    assert f"version {version}," in str(caught.value)
    assert f"version {SCHEMA_VERSION}:" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "5",
        "{}",
        '{"schema_version": "1"}',
        '{"schema_version": null}',
        "\ufeff{}",
        "[" * 100_000,
    ],
    ids=lambda text: f"{text[:24]!r}",
)
def test_a_file_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleCorruptError, match=r"manifest\.json"):
        parse_manifest(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"]["kv"].update(type="int4"),
        lambda data: data["model"]["layers"][0].update(kv_heads=-1),
        lambda data: data["model"].update(vocab_size=-1),
        lambda data: data["model"].update(context_length=0),
        lambda data: data["files"]["model.onnx"].update(bytes=-1),
    ],
    ids=["cache type", "kv_heads", "vocab_size", "context_length", "bytes"],
)
def test_values_that_no_bundle_can_have_are_refused(change: Change) -> None:
    data = as_data()
    change(data)
    with pytest.raises(BundleCorruptError, match=r"manifest\.json"):
        parse_manifest(json.dumps(data))


def test_the_digest_is_the_hash_of_its_written_canonical_form() -> None:
    zeros, effs = "sha256:" + "0" * 64, "sha256:" + "f" * 64
    files = {"\u00e4.json": FileEntry(12, effs), "b.bin": FileEntry(3, zeros)}
    canonical = f'{{"b.bin":{{"bytes":3,"sha256":"{zeros}"}},"\\u00e4.json":{{"bytes":12,"sha256":"{effs}"}}}}'
    expected = "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()
    assert dataclasses.replace(MANIFEST, files=files).digest == expected


def test_the_digest_depends_only_on_the_files() -> None:
    reordered = dataclasses.replace(MANIFEST, files=dict(reversed(MANIFEST.files.items())))
    renamed = dataclasses.replace(MANIFEST, name="other", versions={}, quality={})
    assert reordered.digest == renamed.digest == MANIFEST.digest
    entry = MANIFEST.files["model.onnx"]
    for other in (FileEntry(entry.bytes + 1, entry.sha256), FileEntry(entry.bytes, "sha256:" + "c" * 64)):
        assert dataclasses.replace(MANIFEST, files={**MANIFEST.files, "model.onnx": other}).digest != MANIFEST.digest


# ---- bundles on disk


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a real bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Change) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename_entry(name: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        data["files"][name] = {"bytes": 1, "sha256": "sha256:" + "0" * 64}

    return change


Damage = Callable[[Path], object]
FILES = [
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "report.json",
    "report.html",
]
SEEN_AT_OPEN: dict[str, tuple[Damage, type[BundleError], str]] = {
    "no folder": (shutil.rmtree, BundleMissingError, "bundle"),
    "a file in place of the folder": (
        lambda path: path.rename(path.with_name("moved")).joinpath("model.onnx").rename(path),
        BundleMissingError,
        "bundle",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), BundleMissingError, "manifest.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), BundleCorruptError, "manifest.json"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:900]),
        BundleCorruptError,
        "manifest.json",
    ),
    "binary manifest": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        BundleCorruptError,
        "manifest.json",
    ),
    "a list for a manifest": (
        lambda path: (path / "manifest.json").write_text("[]"),
        BundleCorruptError,
        "manifest.json",
    ),
    "newer schema": (
        lambda path: edit_manifest(path, lambda data: data.update(schema_version=SCHEMA_VERSION + 1)),
        BundleVersionError,
        f"{SCHEMA_VERSION + 1}",
    ),
    "unknown key": (lambda path: edit_manifest(path, lambda data: data.update(more=1)), BundleCorruptError, "more"),
    "no files listed": (
        lambda path: edit_manifest(path, lambda data: data["files"].clear()),
        BundleCorruptError,
        "model.onnx",
    ),
    **{
        f"{name} not listed": (
            lambda path, name=name: edit_manifest(path, lambda data: data["files"].pop(name)),  # type: ignore[misc]
            BundleCorruptError,
            name,
        )
        for name in ("model.onnx", "tokenizer.json")
    },
    **{
        f"file named {name[:12]!r}": (
            lambda path, name=name: edit_manifest(path, rename_entry(name)),  # type: ignore[misc]
            BundleCorruptError,
            "manifest.json",
        )
        for name in ("../x", "../bundle/model.onnx", "/etc/passwd", "a/b", "..", "", "nul\0byte", "half\ud800")
    },
    **{
        f"{name} missing": (lambda path, name=name: (path / name).unlink(), BundleMissingError, name)  # type: ignore[misc]
        for name in FILES
    },
    **{
        f"{name} truncated": (
            lambda path, name=name: (path / name).write_bytes((path / name).read_bytes()[:-1]),  # type: ignore[misc]
            BundleCorruptError,
            name,
        )
        for name in FILES
    },
    "model.onnx empty": (lambda path: (path / "model.onnx").write_bytes(b""), BundleCorruptError, "model.onnx"),
    "a folder in place of a file": (
        lambda path: (path / "tokenizer.json").rename(path / "moved").with_name("tokenizer.json").mkdir(),
        BundleError,
        "tokenizer.json",
    ),
}


def check_refused_on_the_command_line(path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["run", str(path), "Once"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgelm: error: ") and err.count("\n") == 1, err
    assert words in err


@pytest.mark.parametrize("damage", SEEN_AT_OPEN)
def test_damage_that_opening_sees(bundle: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, error, words = SEEN_AT_OPEN[damage]
    break_it(bundle)
    for opening in (Bundle.open, load):
        with pytest.raises(EdgelmError) as caught:
            opening(bundle)
        assert isinstance(caught.value, error)
        assert words in str(caught.value)
    check_refused_on_the_command_line(bundle, words, capsys)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_seen_at_load(
    bundle: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(bundle / name)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleCorruptError) as caught:
        opened.check_files([name])
    assert str(bundle / name) in str(caught.value)
    opened.check_files([other for other in opened.manifest.files if other != name])
    with pytest.raises(BundleCorruptError) as caught:
        load(bundle)
    assert str(bundle / name) in str(caught.value)
    check_refused_on_the_command_line(bundle, name, capsys)


def test_a_file_that_vanishes_after_opening_is_missing(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(BundleMissingError, match=r"model\.onnx\.data"):
        opened.check_files(opened.manifest.files)
    with pytest.raises(BundleMissingError, match=r"model\.onnx\.data"):
        file_digest(bundle / "model.onnx.data")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"]["layers"].append(data["model"]["layers"][0]),
        lambda data: data["model"]["layers"].pop(),
        lambda data: data["model"]["layers"][0].update(kv_heads=3),
        lambda data: data["model"]["kv"].update(type="float32"),
        lambda data: data["model"].update(vocab_size=300),
    ],
    ids=["a layer more", "a layer less", "other heads", "other cache type", "other vocabulary"],
)
def test_a_manifest_that_contradicts_the_graph_is_an_error_of_ours(
    bundle: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(EdgelmError), load(bundle) as engine:
        engine.generate("Once", max_tokens=2)
    check_refused_on_the_command_line(bundle, "", capsys)


@pytest.mark.parametrize("content", ["", "not json", "{}", "[]", "null"])
def test_a_file_that_is_no_tokenizer_is_refused_even_with_the_right_digest(bundle: Path, content: str) -> None:
    replace_file(bundle, "tokenizer.json", content)
    with pytest.raises(BundleCorruptError, match=r"tokenizer\.json"):
        load(bundle)


@pytest.mark.parametrize(
    "content", ["", "not json", "[]", "null", "5", '{"chat_template": [{"name": "default"}]}', '{"chat_template": 5}']
)
def test_a_strange_tokenizer_config_is_refused_even_with_the_right_digest(bundle: Path, content: str) -> None:
    replace_file(bundle, "tokenizer_config.json", content)
    with pytest.raises(EdgelmError), load(bundle) as engine:
        engine.generate(messages=[{"role": "user", "content": "hello"}], max_tokens=1)


def replace_file(bundle: Path, name: str, content: str) -> None:
    (bundle / name).write_text(content, encoding="utf-8")
    entry = {"bytes": (bundle / name).stat().st_size, "sha256": file_digest(bundle / name)}
    edit_manifest(bundle, lambda data: data["files"].update({name: entry}))


def test_an_intact_bundle_passes_every_check(bundle: Path) -> None:
    opened = Bundle.open(str(bundle))
    opened.check_files(opened.manifest.files)
    assert set(opened.manifest.files) == {path.name for path in bundle.iterdir()} - {"manifest.json"}
    assert opened.total_bytes() == sum(path.stat().st_size for path in bundle.iterdir() if path.name != "manifest.json")
    for name, entry in opened.manifest.files.items():
        assert entry.sha256 == "sha256:" + hashlib.sha256((bundle / name).read_bytes()).hexdigest()


def test_texts_are_read_only_where_they_are_listed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "notes.txt").write_text("not part of the bundle", encoding="utf-8")
    assert opened.read_text("notes.txt") is None
    assert opened.read_text("tokenizer_config.json") == (bundle / "tokenizer_config.json").read_text(encoding="utf-8")
    (bundle / "tokenizer_config.json").write_bytes(b"\xff\xff")
    with pytest.raises(BundleCorruptError, match=r"tokenizer_config\.json"):
        opened.read_text("tokenizer_config.json")
