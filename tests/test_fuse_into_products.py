"""A norm or a gate before a row-wise product is fused into its call. Without a kernel nothing changes: same operators,
same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.passes.functions import (
    EDGELM,
    GATED_ROWWISE_MATMUL,
    GELU_GATED_ROWWISE_MATMUL,
    NORMED_ROWWISE_MATMUL,
    POST_NORMED_ROWWISE_MATMUL,
    ROWWISE_MATMUL,
)
from edgelm.export.passes.fuse_into_products import FuseIntoProducts
from edgelm.export.passes.graph import MICROSOFT
from edgelm.export.passes.quantize_linears import QuantizeLinears

from .test_functions import optimized
from .test_passes import Array, compute, count, floats, graph, kinds, one, unchanged

SUM = "float[batch,new,32] a, float[batch,new,32] b -> float[batch,new,12] y"
NORM = f"n, , , t = {MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon = 0.001> (a, b, g)"
GATE = "float[batch,new,48] x -> float[batch,new,12] y"
SPLIT = "gate, up = Split<axis = -1>(x, halves)"
SILU = "s = Sigmoid(gate) silu = Mul(gate, s)"
HALVES = {"halves": np.array([24, 24])}


def product_graph(signature: str, body: str, weights: Mapping[str, Array]) -> ir.Model:
    """A graph with row-wise products, with shapes that onnx cannot infer."""
    model = graph(signature, body, weights, (MICROSOFT,))
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None and node.domain == MICROSOFT and value.name:
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), model.graph.inputs[0].shape
    ir.passes.common.ShapeInferencePass()(model)
    QuantizeLinears("int8-rowwise", 127)(model)
    return model


def assert_fused(signature: str, body: str, weights: Mapping[str, Array], name: str, folder: Path) -> ir.Model:
    """Fuse a graph; neither onnxruntime's optimized operators nor a bit of the results may change."""
    before, model = (product_graph(signature, body, weights) for _ in range(2))
    assert FuseIntoProducts()(model).modified
    assert count(model, name) == 1 and ROWWISE_MATMUL not in kinds(model)
    feeds = {str(value.name): floats(2, 5, int(value.shape[-1])) for value in before.graph.inputs}  # type: ignore
    for got, expected in zip(compute(model, feeds), compute(before, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)
    expected_kinds = optimized(ir.to_proto(before), folder)
    if "Norm" in name:  # a fused norm needs no guard against NaN
        expected_kinds -= Counter({":Mul": 1, ":ReduceSum": 1, ":Add": 1})
    assert optimized(ir.to_proto(model), folder) == expected_kinds
    assert unchanged(FuseIntoProducts(), model)
    return model


def assert_left(signature: str, body: str, weights: Mapping[str, Array]) -> None:
    assert unchanged(FuseIntoProducts(), product_graph(signature, body, weights))


# Norms


def norm_weights() -> dict[str, Array]:
    return {"g": floats(32), "w": floats(32, 12)}


def test_a_norm_goes_into_its_product(tmp_path: Path) -> None:
    model = assert_fused(SUM, f"{NORM} y = MatMul(n, w)", norm_weights(), NORMED_ROWWISE_MATMUL, tmp_path)
    call = one(model, NORMED_ROWWISE_MATMUL)
    assert kinds(model) == [NORMED_ROWWISE_MATMUL]
    assert [value.name for value in call.inputs if value is not None] == ["a", "b", "g", "w.int8", "w.scale"]
    assert call.attributes.get_float("epsilon", 0) == pytest.approx(0.001)


def test_a_norms_sum_stays_available_to_others(tmp_path: Path) -> None:
    """Readers before the product see it too, and it can be an output of the graph."""
    body = f"{NORM} e = Exp(t) p = MatMul(n, w) f = ReduceMax<keepdims = 1>(e) y = Add(p, f)"
    signature = f"{SUM}, float[batch,new,32] t"
    model = assert_fused(signature, body, norm_weights(), NORMED_ROWWISE_MATMUL, tmp_path)
    assert [value.name for value in model.graph.outputs] == ["y", "t"]


def test_a_norm_whose_sum_nobody_reads(tmp_path: Path) -> None:
    body = f"n = {MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon = 0.001> (a, b, g) y = MatMul(n, w)"
    assert_fused(SUM, body, norm_weights(), NORMED_ROWWISE_MATMUL, tmp_path)


NOT_NORMED = {
    "two products": f"{NORM} p = MatMul(n, w) q = MatMul(n, v) y = Add(p, q)",
    "another reader": f"{NORM} p = MatMul(n, w) m = ReduceMax<keepdims = 1>(n) y = Add(p, m)",
    "a product of the sum": f"{NORM} p = MatMul(t, w) m = ReduceMax<keepdims = 1>(n) y = Add(p, m)",
    "no sum": "n = SimplifiedLayerNormalization <axis = -1> (a, g) p = MatMul(n, w) y = Add(p, p)",
    "a bias": f"n = {MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon = 0.001> (a, b, g, g) y = MatMul(n, w)",
    "another norm": f"n = {MICROSOFT}.SkipLayerNormalization <epsilon = 0.001> (a, b, g) y = MatMul(n, w)",
    "a float product": f"{NORM} c = Tanh(w) y = MatMul(n, c)",
}


@pytest.mark.parametrize("case", NOT_NORMED)
def test_other_norms_stay(case: str) -> None:
    weights = {**norm_weights(), "v": floats(32, 12)}
    assert_left(SUM, NOT_NORMED[case], weights)


# Norms after a layer


POST = "p = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (b, v)"
POST_NORM = f"n, , , t = {MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon = 0.001> (a, p, g)"
POST_NORMED = {
    "": f"{POST} {POST_NORM} y = MatMul(n, w)",
    "the other way": f"{POST} {POST_NORM.replace('(a, p,', '(p, a,')} y = MatMul(n, w)",
    "by its axis": f"{POST.replace('-1', '2')} {POST_NORM} y = MatMul(n, w)",
}


def post_weights() -> dict[str, Array]:
    return {**norm_weights(), "v": floats(32)}


@pytest.mark.parametrize("case", POST_NORMED)
def test_a_norm_behind_a_layer_goes_into_the_next_product(case: str, tmp_path: Path) -> None:
    signature = f"{SUM}, float[batch,new,32] t"
    model = assert_fused(signature, POST_NORMED[case], post_weights(), POST_NORMED_ROWWISE_MATMUL, tmp_path)
    assert kinds(model) == [POST_NORMED_ROWWISE_MATMUL]
    call = one(model, POST_NORMED_ROWWISE_MATMUL)
    assert [value.name for value in call.inputs if value is not None] == ["a", "b", "v", "g", "w.int8", "w.scale"]


READ = "m = ReduceMax<keepdims = 1>(p) q = MatMul(n, w) y = Add(q, m)"
NOT_POST_NORMED = {
    "read by others": f"{POST} {POST_NORM} {READ}",
    "another epsilon": f"{POST.replace('0.001', '0.01')} {POST_NORM} y = MatMul(n, w)",
    "along the rows": f"{POST.replace('-1', '1').replace('(b, v)', '(b, c)')} {POST_NORM} y = MatMul(n, w)",
    "weights that are computed": f"e = Exp(v) {POST.replace('v)', 'e)')} {POST_NORM} y = MatMul(n, w)",
    "another norm": f"p = LayerNormalization <axis = -1, epsilon = 0.001> (b, v) {POST_NORM} y = MatMul(n, w)",
}


@pytest.mark.parametrize("case", NOT_POST_NORMED)
def test_other_norms_behind_a_layer_stay(case: str) -> None:
    weights = {**post_weights(), "c": floats(5, 32)}
    model = product_graph(SUM.replace("new", "5"), NOT_POST_NORMED[case], weights)
    assert FuseIntoProducts()(model).modified
    assert count(model, POST_NORMED_ROWWISE_MATMUL) == 0 and count(model, NORMED_ROWWISE_MATMUL) == 1


# Gates


def gate_weights() -> dict[str, Array]:
    return {"w": floats(24, 12), **HALVES}


GATED = {
    "": f"{SPLIT} {SILU} h = Mul(silu, up) y = MatMul(h, w)",
    "factors the other way": f"{SPLIT} s = Sigmoid(gate) silu = Mul(s, gate) h = Mul(up, silu) y = MatMul(h, w)",
    "split in two": f"gate, up = Split<axis = 2, num_outputs = 2>(x) {SILU} h = Mul(silu, up) y = MatMul(h, w)",
}


@pytest.mark.parametrize("case", GATED)
def test_a_gate_goes_into_its_product(case: str, tmp_path: Path) -> None:
    model = assert_fused(GATE, GATED[case], gate_weights(), GATED_ROWWISE_MATMUL, tmp_path)
    assert kinds(model) == [GATED_ROWWISE_MATMUL]
    call = one(model, GATED_ROWWISE_MATMUL)
    assert call.domain == EDGELM
    assert [value.name for value in call.inputs if value is not None] == ["x", "w.int8", "w.scale"]


GELU_GATED = {
    "exact": ("h0 = Gelu(gate) h = Mul(h0, up)", "none"),
    "exact, said": ('h0 = Gelu<approximate = "none">(gate) h = Mul(h0, up)', "none"),
    "by tanh": ('h0 = Gelu<approximate = "tanh">(gate) h = Mul(h0, up)', "tanh"),
    "factors the other way": ('h0 = Gelu<approximate = "tanh">(gate) h = Mul(up, h0)', "tanh"),
}


@pytest.mark.parametrize("case", GELU_GATED)
def test_a_gate_of_gelu_goes_into_its_product(case: str, tmp_path: Path) -> None:
    body, approximate = GELU_GATED[case]
    body = f"{SPLIT} {body} y = MatMul(h, w)"
    model = assert_fused(GATE, body, gate_weights(), GELU_GATED_ROWWISE_MATMUL, tmp_path)
    assert kinds(model) == [GELU_GATED_ROWWISE_MATMUL]
    call = one(model, GELU_GATED_ROWWISE_MATMUL)
    assert call.attributes.get_string("approximate", "") == approximate


NOT_GATED = {
    "the second half": f"up, gate = Split<axis = -1>(x, halves) {SILU} h = Mul(silu, up) y = MatMul(h, w)",
    "another activation": f"{SPLIT} silu = HardSwish(gate) h = Mul(silu, up) y = MatMul(h, w)",
    "gelu of the second half": f"{SPLIT} silu = Gelu(up) h = Mul(silu, gate) y = MatMul(h, w)",
    "a gelu that others read": f"{SPLIT} silu = Gelu(gate) h = Mul(silu, silu) y = MatMul(h, w)",
    "no activation": f"{SPLIT} h = Mul(gate, up) y = MatMul(h, w)",
    "another factor": f"{SPLIT} s = Sigmoid(up) silu = Mul(gate, s) h = Mul(silu, up) y = MatMul(h, w)",
    "itself": f"{SPLIT} {SILU} e = ReduceMax<keepdims = 1>(up) h = Mul(silu, gate) p = MatMul(h, w) y = Add(p, e)",
    "another value": f"{SPLIT} {SILU} e = Tanh(up) h = Mul(silu, e) y = MatMul(h, w)",
    "read by others": f"{SPLIT} {SILU} h = Mul(silu, up) m = ReduceMax<keepdims = 1>(h) p = MatMul(h, w) y = Add(p, m)",
    "thirds": "gate, up, rest = Split<axis = -1, num_outputs = 3>(x) s = Sigmoid(gate) silu = Mul(gate, s) "
    "h = Mul(silu, up) p = MatMul(h, narrow) m = ReduceMax<keepdims = 1>(rest) y = Add(p, m)",
    "along the rows": "c = Concat<axis = 1>(x, x) gate, up = Split<axis = 1, num_outputs = 2>(c) s = Sigmoid(gate) "
    "silu = Mul(gate, s) h = Mul(silu, up) y = MatMul(h, wide)",
}


@pytest.mark.parametrize("case", NOT_GATED)
def test_other_gates_stay(case: str) -> None:
    assert_left(GATE, NOT_GATED[case], {**gate_weights(), "narrow": floats(16, 12), "wide": floats(48, 12)})
