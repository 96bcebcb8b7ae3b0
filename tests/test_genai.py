"""Bundles in onnxruntime-genai: the files beside the graph, and the package itself in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.output import genai
from edgelm.export.output.genai import (
    GENAI_CONFIG_NAME,
    GENAI_GRAPH_NAME,
    genai_config,
    why_irregular,
    write_genai_files,
)
from edgelm.export.passes.last_logits_only import LastLogitsOnly
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import GRAPH_NAME, WEIGHTS_NAME, Bundle
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model, Tokens
from edgelm.runtime.host.ort import load_onnxruntime

from .conftest import ROOT, TEXT

STEPS = 40
LONG = 450
PROMPTS = (
    "Once upon a time",
    "One day, Tom and his dog",
    "The little girl",
    "Lily wanted to play with her friend in the park because",
    '"Mom, can I',
    "It was a cold",
)
LAYER = LayerCache(kv_heads=2, key_size=16, value_size=16, window=None)

# Runs in the other environment. Input: prompts as token ids. Output: the next tokens and the tokenizer's ids.
PROGRAM = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
given, answers = json.load(sys.stdin), []
for ids in given["ids"]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + given["steps"])
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)[len(ids):]])
encoded = [[int(token) for token in tokenizer.encode(text)] for text in given["texts"]]
print(json.dumps({"answers": answers, "encoded": encoded}))
"""


@pytest.fixture(scope="module")
def genai_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with onnxruntime-genai; skips the test if pip cannot install it."""
    venv = tmp_path_factory.mktemp("genai") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    done = subprocess.run([*install, "onnxruntime-genai"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install onnxruntime-genai here: {(done.stderr.splitlines() or ['no reason'])[-1]}")
    return python


def regular(*layers: LayerCache | None) -> Model:
    return Model(
        vocab_size=257, context_length=512, parameters=1, layers=layers or (LAYER, LAYER), kv=CacheType("float32", None)
    )


def config_of(bundle: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((bundle / GENAI_CONFIG_NAME).read_text(encoding="utf-8"))
    return config


# The files


def test_the_files_are_listed_and_the_report_says_so(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert {GENAI_GRAPH_NAME, GENAI_CONFIG_NAME} <= bundle.manifest.files.keys()
    bundle.check_files(bundle.manifest.files)
    report = json.loads((tiny_bundle / "report.json").read_text(encoding="utf-8"))
    assert report["genai"] == {"written": True, "reason": None}


def test_the_configuration_is_what_the_manifest_says(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    config, layer = config_of(tiny_bundle), manifest.model.layers[0]
    model, decoder = config["model"], config["model"]["decoder"]
    assert layer is not None
    assert (model["vocab_size"], model["context_length"]) == (257, 512)
    assert (model["bos_token_id"], model["eos_token_id"]) == (manifest.tokens.bos, list(manifest.tokens.eos))
    assert decoder["num_hidden_layers"] == len(manifest.model.layers)
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (layer.kv_heads, layer.key_size)
    assert decoder["num_attention_heads"] == 4
    assert decoder["filename"] in manifest.files
    assert config["search"]["max_length"] == 512


@pytest.mark.parametrize("scheme", ["fp32", "int8-rowwise"])
def test_the_configuration_names_exactly_the_graphs_inputs_and_outputs(
    export_tiny: Callable[..., Path], scheme: str
) -> None:
    bundle = export_tiny(scheme=scheme)
    decoder = config_of(bundle)["model"]["decoder"]
    graph = ir.load(bundle / GENAI_GRAPH_NAME).graph
    for values, names in ((graph.inputs, decoder["inputs"]), (graph.outputs, decoder["outputs"])):
        layers = range(decoder["num_hidden_layers"])
        told = {name % layer if "%d" in name else name for name in names.values() for layer in layers}
        assert {value.name for value in values} == told


def test_the_graph_is_the_same_over_the_same_weights(tiny_bundle: Path) -> None:
    models = [onnx.load(tiny_bundle / name, load_external_data=False) for name in (GRAPH_NAME, GENAI_GRAPH_NAME)]
    places = [
        {
            item.name: {entry.key: entry.value for entry in item.external_data}
            for item in model.graph.initializer
            if item.data_location == onnx.TensorProto.EXTERNAL
        }
        for model in models
    ]
    assert places[0] == places[1] and places[0]
    assert {place["location"] for place in places[1].values()} == {WEIGHTS_NAME}
    assert [path.name for path in tiny_bundle.glob("*.data")] == [WEIGHTS_NAME]
    inline = [{item.name for item in model.graph.initializer} - places[0].keys() for model in models]
    assert inline[1] - inline[0] == {"logits_to_keep"}
    assert [node.op_type for node in models[0].graph.node] == [node.op_type for node in models[1].graph.node]


def test_the_graphs_logits_are_those_of_the_last_token(tiny_bundle: Path) -> None:
    ort = load_onnxruntime()
    graphs = [ort.InferenceSession(str(tiny_bundle / name)) for name in (GRAPH_NAME, GENAI_GRAPH_NAME)]
    ids = np.arange(2 * 9, dtype=np.int64).reshape(2, 9)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in graphs[1].get_inputs():
        if value.name.startswith("past_key_values"):
            feed[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.int8)
    (logits,) = (value for value in graphs[1].get_outputs() if value.name == "logits")
    assert logits.shape[1:] == [1, 257]
    (whole,) = graphs[0].run(["logits"], {**feed, "logits_to_keep": np.zeros(1, np.int64)})
    (last,) = graphs[1].run(["logits"], feed)
    assert whole.shape == (2, 9, 257)
    np.testing.assert_array_equal(last, whole[:, -1:])


def test_a_long_context_is_not_allocated_by_default() -> None:
    model = dataclasses.replace(regular(), context_length=131072)
    config = genai_config(model, Tokens(bos=None, eos=(), pad=None), attention_heads=4)
    assert config["search"]["max_length"] == 4096
    assert config["model"]["context_length"] == 131072
    assert None not in config["model"].values()


def test_the_pass_requires_the_input_that_it_replaces() -> None:
    graph = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(ir.passes.PreconditionError, match="no input logits_to_keep"):
        LastLogitsOnly()(graph)


# Models that onnxruntime-genai cannot describe


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((LAYER, None), "layer 1 has no attention"),
        ((None, LAYER), "layer 0 has no attention"),
        ((LAYER, dataclasses.replace(LAYER, kv_heads=1)), "layer 1 caches 1 heads of size 16, layer 0 2 of 16"),
        (
            (LAYER, dataclasses.replace(LAYER, key_size=8, value_size=8)),
            "layer 1 caches 2 heads of size 8, layer 0 2 of 16",
        ),
        ((dataclasses.replace(LAYER, value_size=8),) * 2, "layer 0 has keys of size 16 and values of size 8"),
    ],
)
def test_an_irregular_model_gets_neither_file_and_a_reason(
    layers: tuple[LayerCache | None, ...], words: str, tmp_path: Path
) -> None:
    reason = write_genai_files(tmp_path, regular(*layers), Tokens(None, (), None))
    assert reason is not None and words in reason
    assert not list(tmp_path.iterdir())


def test_the_report_says_why_the_files_are_missing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai, "why_irregular", lambda model: "layer 1 has no attention")
    config = ExportConfig(str(tiny_model), target="x86-cpu", scheme="fp32", out=tmp_path / "out")
    result = export_model(config)
    assert result.report["genai"] == {"written": False, "reason": "layer 1 has no attention"}
    assert not {GENAI_GRAPH_NAME, GENAI_CONFIG_NAME} & result.manifest.files.keys()
    with load(result.path) as engine:
        assert engine.generate("Once", max_tokens=2).stats.prompt_tokens == 4


def test_sliding_windows_do_not_make_a_model_irregular() -> None:
    assert why_irregular(regular(LAYER, dataclasses.replace(LAYER, window=64))) is None


# The package itself


# Without int8-tensor: its results depend on the number of tokens in a step, and the runtimes cut steps differently.
# Without kernels, which round the rows of an INT8 cache differently than onnxruntime's attention.
@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("scheme", ["fp32", "int8-rowwise"])
def test_onnxruntime_genai_gives_the_tokens_of_our_runtime(scheme: str, genai_python: Path, tmp_path: Path) -> None:
    config = ExportConfig("builtin:tales", target="x86-cpu", scheme=scheme, out=tmp_path / "tales")
    bundle = export_model(config).path
    with load(bundle) as engine:
        short = [engine.encode(prompt) for prompt in PROMPTS]
        ids = [*short, engine.encode(TEXT)[:LONG]]
        expected = [list(engine.generate(token_ids=prompt, max_tokens=STEPS).token_ids) for prompt in ids]
    assert [len(tokens) for tokens in expected[:-1]] == [STEPS] * len(PROMPTS) and expected[-1]
    command = [str(genai_python), "-c", PROGRAM, str(bundle)]
    given = json.dumps({"ids": ids, "texts": PROMPTS, "steps": STEPS})
    # As in our runtime. Flash attention rounds differently, which can flip a near-tie.
    environment = {"ORT_DISABLE_TELEMETRY": "1", "ORT_GQA_DISABLE_FLASH_ATTENTION": "1"}
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answered = json.loads(done.stdout)
    assert answered["encoded"] == short
    assert answered["answers"] == expected
