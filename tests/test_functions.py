"""The functions of the domain edgelm: their bodies are the documented arithmetic, and onnxruntime optimizes a graph
that calls them like one with the inlined operators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from edgelm.export.passes import quantizing_passes
from edgelm.export.passes.call_attention import CallAttention
from edgelm.export.passes.functions import (
    EDGELM,
    GATED_ROWWISE_MATMUL,
    GELU_GATED_ROWWISE_MATMUL,
    NORMED_ROWWISE_MATMUL,
    POST_NORMED_ROWWISE_MATMUL,
    ROWWISE_MATMUL,
    ROWWISE_MATMUL_TRANSPOSED,
    WIDE,
    define,
)
from edgelm.export.passes.graph import ATTENTION, KEPT_ATTENTION, MICROSOFT
from edgelm.export.passes.keep_last_logits import KeepLastLogits
from edgelm.export.passes.keep_rows import KeepRows
from edgelm.export.passes.quantize_cache import QuantizeCache
from edgelm.export.passes.quantize_linears import QuantizeLinears
from edgelm.runtime.bundle.folder import GRAPH_NAME, WEIGHTS_NAME, Bundle
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions.in_place import OrtSession

from .conftest import TEXT
from .test_passes import (
    ATTEND,
    LINEAR,
    PLAIN,
    RANDOM,
    TIED,
    TOKENS,
    Array,
    X,
    attention_feeds,
    attention_graph,
    compute,
    count,
    floats,
    graph,
    one,
    projections,
    quantized_columns,
    rowwise_reference,
)

STEPS = [list(TEXT[:37].encode()), [65], list(TEXT[37:90].encode())]
PRODUCTS = {ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, NORMED_ROWWISE_MATMUL, GATED_ROWWISE_MATMUL}
LARGEST = {"0.key": np.full((1, 16), 4, np.float32), "0.value": np.full((1, 16), 3, np.float32)}


def optimized(model: onnx.ModelProto | Path, folder: Path) -> Counter[str]:
    """The operators of the graph that onnxruntime runs, counted."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    made = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return Counter(f"{node.domain}:{node.op_type}" for node in made.graph.node)


def flat(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with calls inlined by onnx, as earlier versions of edgelm wrote it."""
    return onnx.inliner.inline_local_functions(model)


def flat_bundle(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle's graph without functions, over the same weights."""
    folder.mkdir()
    (folder / WEIGHTS_NAME).hardlink_to(bundle / WEIGHTS_NAME)
    onnx.save(flat(onnx.load(bundle / GRAPH_NAME, load_external_data=False)), folder / GRAPH_NAME)
    return folder / GRAPH_NAME


def answers(path: Path, bundle: Path) -> list[Array]:
    """The logits of several steps, computed by the runtime."""
    session = OrtSession(path, Bundle.open(bundle).manifest.model, 1)
    try:
        return [session.step(step, len(step)).copy() for step in STEPS]
    finally:
        session.close()


def quantized(signature: str, body: str, weights: Mapping[str, Array]) -> ir.Model:
    model = graph(signature, body, weights)
    for work in quantizing_passes("int8-rowwise", 8, {}):
        work(model)
    return model


# The products


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("name", [ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED])
def test_a_products_body_is_the_documented_arithmetic(name: str, shape: tuple[int, ...]) -> None:
    weight, x = floats(24, 12), floats(*shape)
    if len(shape) == 2 and shape[0] > 1:
        x[0], x[1], x[2] = 0, x[1] * 1000, x[2] * 1e-6
    if len(shape) == 3:
        x[0, 1], x[1, 4], x[1, 0] = 0, 0, -x[1, 0] * 300
    matrix, scales = quantized_columns(weight, 127)
    stored = matrix if name == ROWWISE_MATMUL else np.ascontiguousarray(matrix.T)
    axes = ",".join(f"d{axis}" for axis in range(len(shape) - 1))
    text = f"float[{axes},24] x -> float[{axes},12] y"
    model = graph(text, f"y = {EDGELM}.{name}(x, w, s)", {"w": stored, "s": scales}, (EDGELM, MICROSOFT))
    define(model, name)
    (got,) = compute(model, {"x": x})
    expected = rowwise_reference(x, weight)
    zeros = ~x.any(axis=-1)
    assert not got[zeros].any() and np.isfinite(got).all()
    assert (np.abs(got - expected) <= 1e-6 * np.abs(expected).max(axis=-1, keepdims=True)).all()


def wide_reference(x: Array, weight: Array) -> Array:
    """x @ weight in float32, with rows of 16 bits in two planes of 8, as in the function body."""
    matrix, scales = quantized_columns(weight, 127)
    step, low_step = np.float32(1 / 127), np.float32(1 / 32512)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    shares = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)
    high = np.rint(shares / step)
    low = np.clip(np.rint((shares - high * step) / low_step), -128, 127)
    parts = [(plane.astype(np.int64) @ matrix).astype(np.float32) * (step * scales) for plane in (high, low)]
    return np.asarray((parts[0] + parts[1] * np.float32(1 / 256)) * largest, np.float32)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("name", [ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED])
def test_the_body_of_a_product_of_16_bits_is_the_documented_arithmetic(name: str, shape: tuple[int, ...]) -> None:
    weight, x = floats(24, 12), floats(*shape)
    if len(shape) > 1 and shape[0] > 1:
        x[0], x[1] = 0, x[1] * 1e-6
    matrix, scales = quantized_columns(weight, 127)
    stored = matrix if name == ROWWISE_MATMUL else np.ascontiguousarray(matrix.T)
    axes = ",".join(f"d{axis}" for axis in range(len(shape) - 1))
    call = f"y = {EDGELM}.{name}{WIDE}(x, w, s)"
    model = graph(f"float[{axes},24] x -> float[{axes},12] y", call, {"w": stored, "s": scales}, (EDGELM, MICROSOFT))
    define(model, name + WIDE)
    (got,) = compute(model, {"x": x})
    np.testing.assert_array_equal(got, wide_reference(x, weight))
    # A row alone gives the same bits as all rows at once.
    flat_x, flat_y = x.reshape(-1, 24), got.reshape(-1, 12)
    for i in range(len(flat_x)):
        (alone,) = compute(model, {"x": flat_x[i].reshape((1,) * (len(shape) - 1) + (24,))})
        np.testing.assert_array_equal(alone.reshape(12), flat_y[i])


def test_products_of_16_bits_that_share_their_input_quantize_its_high_plane_once(tmp_path: Path) -> None:
    """onnxruntime never merges DequantizeLinear nodes, so the low plane is computed for each product."""
    calls = " ".join(f"{y} = {EDGELM}.{ROWWISE_MATMUL}{WIDE}(x, {w}, s)" for y, w in ("fq", "gk", "hv"))
    weights = {name: quantized_columns(floats(32, 12), 127)[0] for name in "qkv"} | {"s": np.ones(12, np.float32)}
    text = f"{calls} e = Add(f, g) y = Add(e, h)"
    model = graph("float[batch,new,32] x -> float[batch,new,12] y", text, weights, (EDGELM, MICROSOFT))
    define(model, ROWWISE_MATMUL + WIDE)
    found = optimized(ir.to_proto(model), tmp_path)
    assert [found[f":{kind}"] for kind in ("Abs", "ReduceMax", "Div", "Cast")] == [1, 1, 1, 0]
    assert found[":QuantizeLinear"] == 1 + found[":DequantizeLinear"] == 4
    assert found[f"{MICROSOFT}:MatMulIntegerToFloat"] == found[":Split"] == 3


def test_the_body_of_a_normed_product_is_the_documented_arithmetic() -> None:
    weight, norm, x, skip = floats(24, 12), floats(24), floats(2, 5, 24), floats(2, 5, 24)
    x[0, 1], skip[0, 1] = 0, 0
    matrix, scales = quantized_columns(weight, 127)
    text = "float[batch,new,24] x, float[batch,new,24] skip -> float[batch,new,12] y, float[batch,new,24] total"
    body = f"y, total = {EDGELM}.{NORMED_ROWWISE_MATMUL} <epsilon = 0.25> (x, skip, g, w, s)"
    model = graph(text, body, {"g": norm, "w": matrix, "s": scales}, (EDGELM, MICROSOFT))
    define(model, NORMED_ROWWISE_MATMUL)
    got, total = compute(model, {"x": x, "skip": skip})
    np.testing.assert_array_equal(total, x + skip)
    normed = total / np.sqrt((total.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 0.25) * norm
    assert_a_product_of(got, normed, weight)


def test_the_body_of_a_gated_product_is_the_documented_arithmetic() -> None:
    weight, x = floats(24, 12), floats(2, 5, 48)
    x[0, 1] = 0
    matrix, scales = quantized_columns(weight, 127)
    body = f"y = {EDGELM}.{GATED_ROWWISE_MATMUL} (x, w, s)"
    model = graph(
        "float[batch,new,48] x -> float[batch,new,12] y", body, {"w": matrix, "s": scales}, (EDGELM, MICROSOFT)
    )
    define(model, GATED_ROWWISE_MATMUL)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    assert_a_product_of(compute(model, {"x": x})[0], gate / (1 + np.exp(-gate)) * up, weight)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_body_of_a_product_gated_by_gelu_is_the_documented_arithmetic(approximate: str) -> None:
    weight, x = floats(24, 12), floats(2, 5, 48)
    x[0, 1] = 0
    matrix, scales = quantized_columns(weight, 127)
    body = f'y = {EDGELM}.{GELU_GATED_ROWWISE_MATMUL} <approximate = "{approximate}"> (x, w, s)'
    model = graph(
        "float[batch,new,48] x -> float[batch,new,12] y", body, {"w": matrix, "s": scales}, (EDGELM, MICROSOFT)
    )
    define(model, GELU_GATED_ROWWISE_MATMUL)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    share = np.vectorize(math.erf)(gate / math.sqrt(2))
    if approximate == "tanh":
        share = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    assert_a_product_of(compute(model, {"x": x})[0], gate * (1 + share) / 2 * up, weight)


def test_the_body_of_a_product_behind_two_norms_is_the_documented_arithmetic() -> None:
    weight, post, norm, x, skip = floats(24, 12), floats(24), floats(24), floats(2, 5, 24), floats(2, 5, 24)
    x[0, 1], skip[0, 1] = 0, 0
    matrix, scales = quantized_columns(weight, 127)
    text = "float[batch,new,24] x, float[batch,new,24] skip -> float[batch,new,12] y, float[batch,new,24] total"
    body = f"y, total = {EDGELM}.{POST_NORMED_ROWWISE_MATMUL} <epsilon = 0.25> (x, skip, p, g, w, s)"
    model = graph(text, body, {"p": post, "g": norm, "w": matrix, "s": scales}, (EDGELM, MICROSOFT))
    define(model, POST_NORMED_ROWWISE_MATMUL)
    got, total = compute(model, {"x": x, "skip": skip})
    expected = x + normed(skip, post)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    assert_a_product_of(got, normed(expected, norm), weight)


def normed(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 0.25) * weight)


def assert_a_product_of(got: Array, rows: Array, weight: Array) -> None:
    """Allows a few values to round the other way, because the rows differ in their last bits."""
    expected = rowwise_reference(rows.astype(np.float32), weight)
    step = np.abs(rows).max(axis=-1, keepdims=True) / 127 * np.abs(weight).max()
    assert (np.abs(got - expected) <= 2 * step + 1e-5 * np.abs(expected).max()).all()
    assert (np.abs(got - expected) <= 1e-5 * np.abs(expected).max()).mean() > 0.8
    assert got.any() and not got[0, 1].any()


def test_products_that_share_their_input_quantize_it_once(tmp_path: Path) -> None:
    """Queries, keys and values whose matrices could not be merged."""
    body = "f = MatMul(x, q) g = MatMul(x, k) h = MatMul(x, v) e = Add(f, g) y = Add(e, h)"
    model = quantized(LINEAR, body, {name: floats(32, 12) for name in "qkv"})
    assert count(model, ROWWISE_MATMUL) == 3
    found = optimized(ir.to_proto(model), tmp_path)
    assert (found[f"{MICROSOFT}:MatMulIntegerToFloat"], found[":Mul"]) == (3, 3 + 1)
    once = ("Abs", "ReduceMax", "ReduceSum", "Add", "Div", "QuantizeLinear", "Cast")
    assert [found[f":{kind}"] for kind in once] == [1, 1, 1, 1 + 2, 1, 1, 0]


def test_a_tied_head_is_transposed_when_the_model_is_loaded(tmp_path: Path) -> None:
    model = quantized(TOKENS, TIED, {"table": floats(40, 32)})
    call = one(model, ROWWISE_MATMUL_TRANSPOSED)
    assert [value.name for value in call.inputs[1:] if value is not None] == ["table.rows.int8", "table.scale"]
    assert [function.name for function in model.functions.values()] == [ROWWISE_MATMUL_TRANSPOSED]
    assert count(model, "Transpose") == 0
    assert optimized(ir.to_proto(model), tmp_path)[":Transpose"] == 0


def test_a_head_of_the_other_scheme_is_transposed_by_an_operator() -> None:
    model = graph(TOKENS, TIED, {"table": floats(40, 32)})
    for work in quantizing_passes("int8-tensor", 8, {}):
        work(model)
    assert not model.functions
    assert one(model, "Transpose").inputs[0] is model.graph.initializers["table.rows.int8"]
    compute(model, {"input_ids": RANDOM.integers(0, 40, (2, 5))})


# Attention


def attention(extra: str = "", cached: str = "int8") -> ir.Model:
    """An attention without some inputs in the middle and some attributes."""
    attend = ATTEND.format(out="y", q="q", k="k", v="v").replace("scale=0.3", f"scale=0.3{extra}")
    model = attention_graph(PLAIN + attend, projections(), inputs=X)
    if cached == "int8":
        QuantizeCache(LARGEST)(model)
    CallAttention()(model)
    return model


@pytest.mark.parametrize("cached", ["int8", "float32"])
@pytest.mark.parametrize("extra", ["", ", local_window_size=3"])
def test_attention_is_com_microsofts_operator(extra: str, cached: str, tmp_path: Path) -> None:
    model = attention(extra, cached)
    assert one(model, ATTENTION).domain == EDGELM
    feeds = attention_feeds()
    feeds["x"] = floats(1, 5, 32)
    for side in ("key", "value"):
        feeds[f"past_key_values.0.{side}"] = RANDOM.integers(-127, 128, (1, 1, 3, 16)).astype(cached)
    got, operators = compute(model, feeds), optimized(ir.to_proto(model), tmp_path)
    one(model, ATTENTION).domain = MICROSOFT
    model.functions.clear()
    for left, right in zip(got, compute(model, feeds), strict=True):
        np.testing.assert_array_equal(left, right)
    assert operators == optimized(ir.to_proto(model), tmp_path)


@pytest.mark.parametrize("cached", ["int8", "float32"])
def test_the_last_attention_computes_only_the_kept_rows(cached: str) -> None:
    body = PLAIN + ATTEND.format(out="a", q="q", k="k", v="v") + "p = MatMul(a, w) y = MatMul(p, head)"
    weights = {**projections(), "w": floats(32, 32), "head": floats(32, 32)}
    before, model = (attention_graph(body, weights, inputs=X) for _ in range(2))
    for built in (before, model):
        for node in built.graph:
            value = node.outputs[0]
            if node.op_type in (ATTENTION, "MatMul") and value.shape is None:
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), built.graph.inputs[0].shape
        KeepLastLogits()(built)
        QuantizeLinears("int8-rowwise", 127)(built)
        if built is model:
            assert KeepRows()(built).modified
        if cached == "int8":
            QuantizeCache(LARGEST)(built)
        CallAttention()(built)
    assert (count(before, ATTENTION), count(before, KEPT_ATTENTION)) == (1, 0)
    assert (count(model, ATTENTION), count(model, KEPT_ATTENTION)) == (0, 1)
    assert count(model, "Slice") == 0
    feeds = {**attention_feeds(), "x": floats(1, 5, 32)}
    for side in ("key", "value"):
        feeds[f"past_key_values.0.{side}"] = RANDOM.integers(-127, 128, (1, 1, 3, 16)).astype(cached)
    for keep in (1, 2, 5, 0):
        feeds["logits_to_keep"] = np.array([keep])
        for left, right in zip(compute(model, feeds), compute(before, feeds), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("extra", [", softcap=30.0", ", smooth_softmax=1", ", do_rotary=0, rotary_interleaved=1"])
def test_attention_with_an_unsupported_attribute_stays(extra: str) -> None:
    model = attention(extra)
    assert one(model, ATTENTION).domain == MICROSOFT
    assert not model.functions


@pytest.mark.parametrize("index", [9, 10, 11])
def test_attention_with_an_unsupported_input_stays(index: int) -> None:
    body = PLAIN + ATTEND.format(out="y", q="q", k="k", v="v")
    model = attention_graph(body, projections(), inputs=X)
    node = one(model, ATTENTION)
    node.resize_inputs(12)
    node.replace_input_with(index, model.graph.inputs[0])
    CallAttention()(model)
    assert node.domain == MICROSOFT and not model.functions


@pytest.mark.parametrize(
    ("extra", "cached", "open_"), [("", "int8", 4), ("", "float32", 0), (", softcap=30.0", "int8", 0)]
)
def test_row_length_is_symbolic_if_kernels_may_compute_all_attention(extra: str, cached: str, open_: int) -> None:
    """If any attention stays onnxruntime's, which has no scales per row, all rows are of head size."""
    model = attention(extra, cached)
    shapes = [value.shape for value in (*model.graph.inputs, *model.graph.outputs) if ".0." in (value.name or "")]
    rows = [shape[-1] for shape in shapes if shape is not None and shape[-1] != 16]
    assert len(shapes) == 4
    assert len(rows) == open_
    assert len({str(row) for row in rows}) == open_ // 2, "past and present share a symbol; keys and values do not"


# Bundles


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {*PRODUCTS, ATTENTION, KEPT_ATTENTION}),
        ({"kv": "float32"}, {*PRODUCTS, ATTENTION, KEPT_ATTENTION}),
        ({"scheme": "int8-tensor"}, set()),
        ({"scheme": "int8-tensor", "kv": "int8"}, {ATTENTION}),
        ({"scheme": "fp32"}, set()),
    ],
)
def test_a_bundle_calls_the_functions_that_it_defines(
    export_tiny: Callable[..., Path], settings: dict[str, Any], names: set[str]
) -> None:
    for graph_name in (GRAPH_NAME, "model.genai.onnx"):
        model = onnx.load(export_tiny(**settings) / graph_name, load_external_data=False)
        called = {node.op_type for node in model.graph.node if node.domain == EDGELM}
        assert {name.removesuffix(WIDE) for name in called} == names
        assert {(function.domain, function.name) for function in model.functions} == {(EDGELM, name) for name in called}
        if names >= PRODUCTS:
            assert "MatMulIntegerToFloat" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("settings", [{}, {"kv": "float32"}])
def test_a_graph_without_functions_gives_the_same_bits(
    export_tiny: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, without_kernels: None
) -> None:
    """Bundles of earlier versions have graphs without functions."""
    bundle = export_tiny(**settings)
    plain = flat_bundle(bundle, tmp_path / "flat")
    found = onnx.load(plain, load_external_data=False)
    assert not found.functions and EDGELM not in {node.domain for node in found.graph.node}
    for got, expected in zip(answers(bundle / GRAPH_NAME, bundle), answers(plain, bundle), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert optimized(bundle / GRAPH_NAME, tmp_path) == optimized(plain, tmp_path)
