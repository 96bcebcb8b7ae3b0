"""Bundles of compressed models: irregular layers work from export to decoding and give the compressed torch model's
tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from edgelm.export import ExportConfig, export_model
from edgelm.export.compress.folder import write_compressed
from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.step import Workbench
from edgelm.export.source.compressed import Record
from edgelm.export.source.loading import load_module
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.bundle.manifest import Source
from edgelm.runtime.cli import main

from .conftest import TEXT, WIDE_TARGET, byte_tokenizer, shared, tiny_llama
from .model_zoo import tiny_model as zoo_model
from .test_compress import torch_greedy, write_recipe

# UNEQUAL makes layers differ in every way; SHARED keeps their sizes and shares weights between layers.
UNEQUAL: list[dict[str, Any]] = [
    {"use": "drop-layers", "layers": [1]},
    {"use": "skip-attention", "layers": [3]},
    {"use": "prune-structured", "ratio": 0.1},
    {"use": "low-rank", "matrices": ["*down_proj"], "ratio": 0.2},
]
SHARED: list[dict[str, Any]] = [
    {"use": "prune-magnitude", "ratio": 0.2},
    {"use": "low-rank", "ratio": 0.2},
    {"use": "share-weights", "groups": [[0, 4], [2, 3]], "value": "first"},
]
RECIPES = {"unequal": UNEQUAL, "shared": SHARED}
PROMPTS, STEPS = 20, 100
TOKENS = 24


def compress(model: Path, steps: list[dict[str, Any]], folder: Path) -> Any:
    """Compress without figures, which cost an export each; writes the folder and returns the torch module."""
    module: Any = load_module(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bench = Workbench(tokenizer(TEXT)["input_ids"], tokenizer, model, folder, 512, print)
    for step in parse_recipe({"step": steps}, "test", "test").steps:
        module = step.apply(module, bench).module
    folder.mkdir()
    source = Source(str(model), None, type(module).__name__, None)
    write_compressed(module, tokenizer, Record(source, "test", "test", ()), folder)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The INT8 bundle of a tiny model of five layers, compressed by a recipe; made once. "shared" is compressed by the
    export, as users do it, "unequal" before it without figures, which would take as long again."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            model, recipe = folder / "m", None
            tiny_llama(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4).save_pretrained(model)
            byte_tokenizer(model)
            if name == "shared":
                recipe = write_recipe(folder / "r.toml", *SHARED)
            else:
                compress(model, UNEQUAL, folder / "small")
                model = folder / "small"
            config = ExportConfig(str(model), target=WIDE_TARGET, out=folder / "b", compress=recipe)
            done[name] = export_model(config).path
        return done[name]

    return make


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_irregular_layers_work_with_prefixes_batches_and_drafts(bundle: Callable[[str], Path], name: str) -> None:
    """Answers with the prefix cache, in a batch and with draft tokens are those of plain decoding."""
    layers = Bundle.open(bundle(name)).manifest.model.layers
    prompts = [TEXT[begin : begin + 40] for begin in (0, 0, 100, 200)] + [TEXT[:90], "ab ab ab ab ab ab ab"]
    with load(bundle(name), response_cache=False, prefix_cache=False) as engine:
        alone = [engine.generate(prompt, max_tokens=TOKENS, lookup=False).token_ids for prompt in prompts]
        assert [engine.generate(prompt, max_tokens=TOKENS).token_ids for prompt in prompts] == alone
        assert [done.token_ids for done in engine.generate_batch(prompts, max_tokens=TOKENS)] == alone
    for _ in range(2):  # the second time, prefixes come from files
        with load(bundle(name), response_cache=False) as engine:
            assert [engine.generate(prompt, max_tokens=TOKENS).token_ids for prompt in prompts] == alone
    assert main(["verify", str(bundle(name))]) == 0
    genai = json.loads((bundle(name) / "report.json").read_text(encoding="utf-8"))["genai"]
    if name == "shared":
        assert all(layer == layers[0] for layer in layers) and genai["written"]
    else:
        assert layers[1] is None and layers[3] is None and len({layer.kv_heads for layer in layers if layer}) > 1
        assert not genai["written"] and "layer 1 has no attention" in genai["reason"]


def test_the_report_shows_what_each_step_left(
    bundle: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bundle("shared")), "--report"]) == 0
    shown = capsys.readouterr().out
    page = (bundle("shared") / "report.html").read_text(encoding="utf-8")
    for step in Bundle.open(bundle("shared")).manifest.compression:
        assert "note" in step["details"] or step["use"] != "prune-magnitude"
        assert f"  {step['use']} " in shown and f"<td>{step['use']}</td>" in page
    assert "Compressed before" in page and "zeros save no time" in shown and "zeros save no time" in page


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_stories_are_told_as_the_compressed_torch_model_tells_them(name: str, tmp_path: Path) -> None:
    stories = json.loads(shared("text/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
    module = compress(shared("models/stories260k"), RECIPES[name], tmp_path / "small")
    config = ExportConfig(str(tmp_path / "small"), out=tmp_path / "bundle", scheme="fp32", target="x86-cpu")
    with load(export_model(config).path, response_cache=False) as engine:
        for index, story in enumerate(stories[:PROMPTS]):
            ids = engine.encode(story[: 10 + 7 * index])
            done = engine.generate(token_ids=ids, max_tokens=STEPS)
            settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
            expected = module.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
            assert list(done.token_ids) == expected[: len(done.token_ids)], story[:60]
            assert len(done.token_ids) == STEPS or done.finish_reason == "stop"


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("bloom", [{"use": "low-rank", "ratio": 0.2}, {"use": "share-weights", "groups": [[0, 1]]}]),
        ("gptj", [{"use": "drop-layers", "layers": [0]}, {"use": "low-rank", "energy": 0.8}]),
    ],
)
def test_plain_attention_takes_the_steps_that_fit(kind: str, steps: list[dict[str, Any]], tmp_path: Path) -> None:
    zoo_model(kind).save_pretrained(tmp_path / "m")
    byte_tokenizer(tmp_path / "m")
    module = compress(tmp_path / "m", steps, tmp_path / "small")
    config = ExportConfig(str(tmp_path / "small"), out=tmp_path / "bundle", scheme="fp32", target="x86-cpu")
    with load(export_model(config).path, response_cache=False) as engine:
        assert (engine.bundle.manifest.model.layers[0] is None) == (kind == "gptj")
        ids = list(TEXT.encode())[:30]
        answer = engine.generate(token_ids=ids, max_tokens=20)
        assert list(answer.token_ids) == torch_greedy(module, ids, 20)[: len(answer.token_ids)]
