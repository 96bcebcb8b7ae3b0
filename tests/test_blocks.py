"""Weights of 4 and 8 bits in blocks: the stored values, what the graph computes with them, the cost in quality."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgelm.export import ExportConfig, export_model
from edgelm.export.codes.blocks import BLOCK_SCHEMES, BLOCK_SIZES, BlockQuantizer, Blocks, BlockSettings, Method
from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.run import compress_model
from edgelm.export.compress.steps.weights_int4 import WeightsInt4, noted_weights
from edgelm.export.errors import RecipeError
from edgelm.export.passes import fusing_passes
from edgelm.export.passes.graph import MICROSOFT
from edgelm.export.passes.quantize_blocks import QuantizeBlocks
from edgelm.export.quantization.hessians import collect_hessians
from edgelm.export.quantization.quantizer import Quantizer
from edgelm.export.source.finding import find_source
from edgelm.export.source.loading import describe_source, load_module
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.bundle.manifest import CacheType, Model
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.targets import load_target

from .conftest import ROOT, TEXT, compare_texts, tiny_llama

if TYPE_CHECKING:
    from edgelm.export.compress.step import Workbench

INPUTS, OUTPUTS = 96, 40


def matrix(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


def dequantized(blocks: Blocks, settings: BlockSettings, inputs: int = INPUTS) -> NDArray[np.float32]:
    """The stored weights as (inputs, outputs), with an unpacking of its own."""
    values = blocks.values
    if settings.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
    count = blocks.scales.shape[1]
    zeros = np.full(blocks.scales.shape, 1 << (settings.bits - 1), np.uint8)
    if blocks.zero_points is not None:
        zeros = blocks.zero_points
        if settings.bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, :count]
    wide = (values.astype(np.float32) - zeros[..., None]) * blocks.scales[..., None]
    return np.asarray(wide.reshape(len(wide), -1)[:, :inputs].T, np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_off_by_half_a_step_at_most(bits: int, block: int, symmetric: bool) -> None:
    settings = BlockSettings(bits, block)
    blocks = BlockQuantizer(settings).quantized("w", matrix(), symmetric)
    count = -(-INPUTS // block)
    assert blocks.values.shape == (OUTPUTS, count, block * bits // 8)
    assert blocks.scales.shape == (OUTPUTS, count)
    assert (blocks.zero_points is None) == symmetric
    step = np.abs(np.repeat(blocks.scales, block, axis=1)[:, :INPUTS].T)
    # A symmetric range is one step shorter on one side; rounding a zero point shifts both ends.
    assert (np.abs(dequantized(blocks, settings) - matrix()) <= 1.01 * step).all()
    assert np.abs(dequantized(blocks, settings) - matrix()).mean() < 0.3 * step.mean()


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_half_quadratic_quantization_is_as_near_as_rounding(block: int) -> None:
    settings = BlockSettings(4, block, "hqq")
    found = BlockQuantizer(settings).quantized("w", matrix(), symmetric=False)
    plain = BlockQuantizer(BlockSettings(4, block)).quantized("w", matrix(), symmetric=False)
    assert found.zero_points is not None and plain.zero_points is not None
    assert (found.values.shape, found.zero_points.shape) == (plain.values.shape, plain.zero_points.shape)
    error = np.abs(dequantized(found, settings) - matrix()).mean()
    assert error < 1.1 * np.abs(dequantized(plain, settings) - matrix()).mean()


def test_gptq_makes_products_with_the_texts_inputs_more_exact() -> None:
    """On correlated inputs, as a real layer's are."""
    draw = np.random.default_rng(1)
    rows = (draw.standard_normal((400, 12)) @ draw.standard_normal((12, INPUTS))).astype(np.float32)
    rows += 0.1 * draw.standard_normal(rows.shape).astype(np.float32)
    hessian = rows.T @ rows / np.float32(len(rows))
    settings = BlockSettings(4, 32, "gptq")
    found = BlockQuantizer(settings, {"w": hessian}).quantized("w", matrix(), symmetric=False)
    plain = BlockQuantizer(BlockSettings(4, 32)).quantized("w", matrix(), symmetric=False)
    errors = [np.square(rows @ (dequantized(blocks, settings) - matrix())).mean() for blocks in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_a_matrix_is_quantized_only_once() -> None:
    quantizer = BlockQuantizer(BlockSettings(4))
    assert quantizer.quantized("w", matrix(), True) is quantizer.quantized("w", matrix(), True)
    assert quantizer.quantized("w", matrix(), False) is not quantizer.quantized("w", matrix(), True)


def test_quantizing_leaves_the_programs_logging_unchanged() -> None:
    before = (logging.getLogger().level, list(logging.getLogger().handlers))
    BlockQuantizer(BlockSettings(4)).quantized("w", matrix(), True)
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def small_graph(tied: bool) -> ir.Model:
    """ids -> embedding -> head, tied or not. Hidden size 96: no multiple of 64 or 128."""
    draw = np.random.default_rng(2)
    table = ir.Value(name="table", const_value=ir.tensor(draw.standard_normal((50, INPUTS)).astype(np.float32)))
    head = table if tied else ir.Value(name="head", const_value=ir.tensor(matrix()))
    for value in {table, head}:
        assert value.const_value is not None
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(list(value.const_value.shape))
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "new"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [table, ids])
    gather.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    gather.outputs[0].shape = ir.Shape(["batch", "new", INPUTS])
    nodes = [gather]
    if tied:
        nodes.append(ir.node("Transpose", [table], {"perm": [1, 0]}))
    matmul = ir.node("MatMul", [gather.outputs[0], nodes[-1].outputs[0] if tied else head])
    matmul.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    matmul.outputs[0].shape = ir.Shape(["batch", "new", 50 if tied else OUTPUTS])
    for index, node in enumerate([*nodes, matmul]):
        node.name = f"node{index}"
        node.outputs[0].name = f"value{index}"
    graph = ir.Graph(
        [ids], [matmul.outputs[0]], nodes=[*nodes, matmul], initializers=list({table, head}), opset_imports={"": 20}
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    session = load_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"input_ids": ids})[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_a_graph_computes_with_what_is_stored(tied: bool, bits: int, block: int) -> None:
    ids = np.array([[0, 7, 49], [3, 3, 11]])
    model, settings = small_graph(tied), BlockSettings(bits, block)
    quantizer = BlockQuantizer(settings)
    assert QuantizeBlocks(quantizer)(model).modified
    table = dequantized(quantizer.quantized("table", np.zeros(0), True), settings)
    head = table if tied else dequantized(quantizer.quantized("head", np.zeros(0), False), settings)
    expected = table.T[ids] @ head
    # The CPU may round the activations of a block to 8 bits.
    assert np.abs(run(model, ids) - expected).max() < 0.02 * np.abs(expected).max()
    assert sum(name.endswith(".blocks") for name in model.graph.initializers) == (1 if tied else 2)
    assert not {"table", "head"} & set(model.graph.initializers)
    assert {node.op_type for node in model.graph if node.domain == MICROSOFT} == {
        "MatMulNBits",
        "GatherBlockQuantized",
    }


def test_excluded_matrices_stay(tmp_path: Path) -> None:
    model = small_graph(tied=False)
    QuantizeBlocks(BlockQuantizer(BlockSettings(4)), ["head"])(model)
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "MatMulNBits")] == ["MatMul"]
    assert "head" in model.graph.initializers


def test_a_bundle_with_weights_in_blocks(export_tiny: Callable[..., Path]) -> None:
    bundle = Bundle.open(export_tiny(scheme="int8-weight"))
    manifest = bundle.manifest
    assert manifest.quantization.scheme == "int8-weight"
    assert manifest.quantization.excluded == ()
    assert manifest.model.kv.type == "int8"
    assert not manifest.exact_under_cuts
    assert manifest.quality["against_fp32"]["perplexity_increase_percent"] < 3
    # 8 bits, a float32 scale per 32 of them, and the rotary tables: 513 positions, 8 angles, cosine and sine.
    assert manifest.files["model.onnx.data"].bytes < 1.3 * manifest.model.parameters + 2 * 4 * 513 * 8
    with load(bundle.path) as engine:
        assert len(engine.generate("Once", max_tokens=8).token_ids) == 8


def recipe(**keys: Any) -> dict[str, Any]:
    return {"step": [{"use": "weights-int4", **keys}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "awq"}, "method must be 'rtn' or 'hqq' or 'gptq', found 'awq'"),
        ({"block": 48}, "block must be 32 or 64 or 128, found 48"),
        ({"bits": 4}, "weights-int4 has no key bits"),
    ],
)
def test_a_mistake_in_the_step_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe(**keys), "mine", "mine.toml")


def test_the_step_reads_its_keys() -> None:
    (step,) = parse_recipe(recipe(method="gptq", block=64), "mine", "mine.toml").steps
    assert step == WeightsInt4("gptq", 64)


def write_recipe(folder: Path, method: Method) -> str:
    path = folder / "four.toml"
    path.write_text(f'[[step]]\nuse = "weights-int4"\nmethod = "{method}"\n', encoding="utf-8")
    return str(path)


def test_another_scheme_than_the_recipes_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        str(tiny_model), "x86-cpu", "int8-rowwise", out=tmp_path / "out", compress=write_recipe(tmp_path, "rtn")
    )
    with pytest.raises(RecipeError, match="asks for the scheme int4-weight, and --scheme says int8-rowwise"):
        export_model(config)


@pytest.mark.parametrize(
    "note", ["rtn", {"method": "rtn"}, {"method": "awq", "block": 32}, {"method": "hqq", "block": 1}]
)
def test_a_note_that_no_step_wrote_is_refused(note: Any) -> None:
    model = tiny_llama()
    assert noted_weights(model) is None
    model.config.edgelm_weights = note
    with pytest.raises(RecipeError, match=r"edgelm_weights is .* which no step writes: compress the model again"):
        noted_weights(model)


def test_a_second_weights_step_is_refused() -> None:
    model, bench = tiny_llama(), cast("Workbench", None)
    WeightsInt4("hqq", 64).apply(model, bench)
    assert noted_weights(model) == BlockSettings(4, 64, "hqq")
    with pytest.raises(RecipeError, match="weights-int4 was already applied to this model"):
        WeightsInt4().apply(model, bench)


def lax_target(folder: Path) -> str:
    """The machine's target with gate limits that 4 bits on random weights stay within."""
    text = (ROOT / "targets" / "x86-cpu.toml").read_text(encoding="utf-8")
    for strict, lax in (("percent = 3.0", "percent = 1e9"), ("percent = 97.0", "percent = 0.0")):
        assert strict in text
        text = text.replace(strict, lax)
    path = folder / "lax.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_recipe_sets_the_scheme_and_a_compressed_folder_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    """Exporting a folder that a recipe wrote gives the same bundle as exporting with the recipe."""
    path, target = write_recipe(tmp_path, "gptq"), lax_target(tmp_path)
    compress_model(ExportConfig(str(tiny_model), target, out=tmp_path / "small", compress=path))
    direct = export_model(ExportConfig(str(tiny_model), target, out=tmp_path / "direct", compress=path))
    later = export_model(ExportConfig(str(tmp_path / "small"), target, out=tmp_path / "later"))
    assert direct.manifest.quantization.scheme == later.manifest.quantization.scheme == "int4-weight"
    assert direct.manifest.compression == ({"use": "weights-int4", "method": "gptq", "block": 32, "details": {}},)
    assert direct.manifest.files["model.onnx.data"] == later.manifest.files["model.onnx.data"]
    plain = export_model(ExportConfig(str(tiny_model), target, "int4-weight", out=tmp_path / "plain"))
    assert plain.manifest.files["model.onnx.data"] != direct.manifest.files["model.onnx.data"]
    with pytest.raises(RecipeError, match=r"was compressed with weights-int4.*leave one of them out"):
        export_model(ExportConfig(str(tmp_path / "small"), target, "fp32", out=tmp_path / "other"))


@dataclass(frozen=True)
class Tales:
    """The fp32 graph of the model that comes with edgelm."""

    graph: Path
    shape: Model
    token_ids: list[int]

    def session(self, graph: Path, kv: str) -> OrtSession:
        return OrtSession(graph, dataclasses.replace(self.shape, kv=CacheType(kv, None)), 1)


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Tales:
    folder = find_source("builtin:tales", None)
    module = load_module(folder)
    source = describe_source("builtin:tales", folder, module)
    traced = trace_model(module)
    ir.passes.PassManager(fusing_passes(source.context_length))(traced.graph)
    graph = tmp_path_factory.mktemp("tales") / GRAPH_NAME
    ir.save(traced.graph, graph, external_data="model.onnx.data")
    shape = Model(
        source.vocab_size, source.context_length, source.parameters, traced.layers, CacheType("float32", None)
    )
    return Tales(graph, shape, source.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:1000])


@pytest.mark.parametrize(
    ("scheme", "activations", "most_percent", "most_bytes"),
    [
        ("int8-weight", "float32", 0.6, 3.7e6),
        ("int4-weight", "float32", 4.0, 2.2e6),
        ("int8-weight", "float16", 0.6, 3.4e6),
        ("int4-weight", "float16", 4.0, 1.9e6),
        ("fp16", "float16", 0.1, 6e6),
    ],
)
def test_what_a_scheme_costs_a_trained_model(
    *, tales: Tales, tmp_path: Path, scheme: str, activations: str, most_percent: float, most_bytes: float
) -> None:
    graph = Quantizer(tales.graph, scheme, 8, {}, activations).quantized()
    ir.save(graph, tmp_path / GRAPH_NAME, external_data="model.onnx.data")
    before, after = tales.session(tales.graph, "float32"), tales.session(tmp_path / GRAPH_NAME, activations)
    found = compare_texts(before, after, tales.token_ids, 512, load_target("cuda").gate)
    assert found.perplexity_increase_percent < most_percent
    assert found.decided_percent > 98
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < most_bytes


def test_hessians_are_those_of_the_inputs(tmp_path: Path) -> None:
    """The first norm's output computed by torch, against what the graph's run collects."""
    import torch

    model = tiny_llama()
    traced = trace_model(model)
    ir.passes.PassManager(fusing_passes(512))(traced.graph)
    ir.save(traced.graph, tmp_path / GRAPH_NAME, external_data="model.onnx.data")
    ids = list(TEXT[:300].encode())
    found = collect_hessians(tmp_path / GRAPH_NAME, ids, 512)
    with torch.no_grad():
        rows = [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids)))]
    whole = torch.cat(rows).numpy()
    (name,) = [name for name in found if "layers.0.self_attn.q_proj" in name]
    np.testing.assert_allclose(found[name], whole.T @ whole / len(ids), rtol=1e-3, atol=1e-4)
    assert len(found) == 4 * 2 + 1
    assert not (tmp_path / "hessians.onnx").exists()


def test_the_schemes_are_those_with_settings() -> None:
    assert {name: settings.bits for name, settings in BLOCK_SCHEMES.items()} == {"int8-weight": 8, "int4-weight": 4}
