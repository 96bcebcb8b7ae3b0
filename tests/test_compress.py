"""Compression: recipes are parsed strictly, steps do what they say, and a compressed model exports like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelm.export import ExportConfig, compress_model, export_model
from edgelm.export.compress.recipe import load_recipe, parse_recipe
from edgelm.export.errors import OutputError, RecipeError, SourceError
from edgelm.export.module.edits import edit, edits_of, replay
from edgelm.export.module.structure import attention_sublayers, decoder_layers
from edgelm.export.source.loading import load_module
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle

from .conftest import tiny_llama

PROMPTS = ["Once upon a time", "One day, Tom", "The cat", "a"]


def write_recipe(path: Path, *steps: dict[str, Any]) -> str:
    """Write a TOML file of these steps."""
    lines = []
    for step in steps:
        lines += ["[[step]]", *(f"{key} = {json.dumps(value)}" for key, value in step.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def torch_greedy(module: Any, ids: list[int], steps: int) -> list[int]:
    """The most likely tokens of the compressed torch model, computed without a cache."""
    import torch

    tokens = list(ids)
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(module(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "one or more [[step]]"),
        ([{"use": "drop-layer", "last": 1}], "did you mean drop-layers?"),
        ([{"last": 1}], "the key use is missing"),
        ([{"use": "drop-layers", "first": 1}], "has no key first"),
        ([{"use": "drop-layers"}], "give one of"),
        ([{"use": "drop-layers", "last": 1, "layers": [0]}], "found last, layers"),
        ([{"use": "drop-layers", "last": 0}], "one layer or more"),
        ([{"use": "skip-attention", "layers": []}], "one layer or more"),
        ([{"use": "skip-attention", "layers": [1, 1]}], "twice"),
        ([{"use": "skip-attention", "layers": [True]}], "whole number"),
        ([{"use": "skip-attention", "last": "two"}], "must be a number"),
        ([{"use": "skip-attention", "last": 1.5}], "a share between 0 and 1, found 1.5"),
        ([{"use": "skip-attention", "least_useful": -1}], "one layer or more"),
        ([{"use": "prune-magnitude", "ratio": 1}], "ratio must be between 0 and 1, found 1"),
        ([{"use": "prune-structured", "ratio": 0.0}], "ratio must be between 0 and 1, found 0"),
        ([{"use": "prune-structured", "ratio": 0.1, "importance": "size"}], "'taylor' or 'magnitude'"),
        ([{"use": "prune-structured"}], "needs the key ratio"),
        ([{"use": "low-rank"}], "give one of ratio and energy, found none"),
        ([{"use": "low-rank", "ratio": 0.1, "energy": 0.9}], "found ratio, energy"),
        ([{"use": "low-rank", "energy": 1.0}], "energy must be between 0 and 1"),
        ([{"use": "low-rank", "ratio": 0.1, "matrices": "*"}], "must be a list"),
        ([{"use": "share-weights"}], "give embedding = true, groups or every"),
        ([{"use": "share-weights", "every": 1}], "every must be 2 or more"),
        ([{"use": "share-weights", "every": 2, "groups": [[0, 1]]}], "found both"),
        ([{"use": "share-weights", "groups": [[0]]}], "two layers or more"),
        ([{"use": "share-weights", "groups": [[0, 1], [1, 2]]}], "a layer twice"),
        ([{"use": "share-weights", "groups": [0, 1]}], "must be a list"),
    ],
)
def test_recipe_that_is_refused(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"step": steps}, "test", "test.toml")
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(RecipeError, match="ratio must be a finite number"):
        parse_recipe({"step": [{"use": "prune-structured", "ratio": value}]}, "test", "test.toml")


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean light"):
        load_recipe("ligth")


def test_a_recipe_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[[step", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read as TOML"):
        load_recipe(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("use", ["drop-layers", "skip-attention"])
@pytest.mark.parametrize(("keys", "words"), [({"layers": [7]}, "there is no"), ({"last": 2}, "at most 1 of 2")])
def test_layers_that_do_not_exist_are_refused(
    tiny_model: Path, tmp_path: Path, use: str, keys: dict[str, Any], words: str
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": use, **keys})
    with pytest.raises(RecipeError, match=words):
        compress_model(ExportConfig(str(tiny_model), out=tmp_path / "out", compress=recipe))
    assert not (tmp_path / "out").exists()


def test_replayed_edits_give_the_same_module() -> None:
    module = tiny_llama(num_hidden_layers=4)
    edit(module, "skip_attention", layers=[1, 2])
    edit(module, "drop_layers", layers=[3])
    again = tiny_llama(num_hidden_layers=4)
    replay(again, edits_of(module))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert edits_of(again) == edits_of(module)
    assert list(attention_sublayers(again)) == [0]
    assert list(decoder_layers(again)) == [0, 1, 2, 3]


def test_unknown_edit_is_refused() -> None:
    with pytest.raises(SourceError, match="an edit that this edgelm does not know"):
        replay(tiny_llama(), [{"edit": "grow"}])


def test_compressed_folder_exports_as_the_recipe_does(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": "skip-attention", "layers": [0]})
    folder = tmp_path / "small"
    record = compress_model(ExportConfig(str(tiny_model), out=folder, compress=recipe))
    assert record.steps[0]["after"]["parameters"] < record.steps[0]["before"]["parameters"]
    direct = export_model(ExportConfig(str(tiny_model), out=tmp_path / "direct", scheme="fp32", compress=recipe))
    later = export_model(ExportConfig(str(folder), out=tmp_path / "later", scheme="fp32"))
    for name in ("model.onnx", "model.onnx.data"):
        assert (direct.path / name).read_bytes() == (later.path / name).read_bytes()
    assert later.manifest.compression == direct.manifest.compression
    assert later.manifest.name == "tiny"
    assert later.manifest.source.model == str(tiny_model)
    assert later.manifest.model.layers[0] is None
    assert later.manifest.model.layers[1] is not None


def test_bundle_of_a_compressed_model_answers_as_torch_does(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": "skip-attention", "least_useful": 1})
    folder, out = tmp_path / "small", tmp_path / "bundle"
    compress_model(ExportConfig(str(tiny_model), out=folder, compress=recipe))
    export_model(ExportConfig(str(folder), out=out, scheme="fp32"))
    module = load_module(folder)
    with load(out, response_cache=False) as engine:
        for prompt in PROMPTS:
            ids = list(prompt.encode())
            done = engine.generate(token_ids=ids, max_tokens=40)
            assert list(done.token_ids) == torch_greedy(module, ids, 40)[: len(done.token_ids)]


def test_layer_without_attention_leaves_no_trace_in_the_graph(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": "drop-layers", "last": 1})
    result = export_model(ExportConfig(str(tiny_model), out=tmp_path / "b", scheme="fp32", compress=recipe))
    whole = export_model(ExportConfig(str(tiny_model), out=tmp_path / "whole", scheme="fp32"))
    sizes = [(path / "model.onnx").stat().st_size for path in (result.path, whole.path)]
    assert sizes[0] < sizes[1]
    assert b"past_key_values.1." not in (result.path / "model.onnx").read_bytes()
    assert Bundle.open(result.path).manifest.compression[0]["details"]["layers"] == [1]


def test_an_existing_output_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    recipe = write_recipe(tmp_path / "r.toml", {"use": "drop-layers", "last": 1})
    with pytest.raises(OutputError, match="does not replace it"):
        compress_model(ExportConfig(str(tiny_model), out=tmp_path / "mine", compress=recipe, force=True))
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
