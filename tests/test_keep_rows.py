"""The last layer's row-by-row work is done only for rows whose logits are asked for, with the same bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from edgelm.export.passes.functions import NORMED_ROWWISE_MATMUL, ROWWISE_MATMUL
from edgelm.export.passes.fuse_into_products import FuseIntoProducts
from edgelm.export.passes.graph import MICROSOFT
from edgelm.export.passes.keep_last_logits import KeepLastLogits
from edgelm.export.passes.keep_rows import KeepRows
from edgelm.export.passes.quantize_linears import QuantizeLinears

from .test_passes import compute, count, floats, graph, one, unchanged

SIGNATURE = "float[batch,new,32] x -> float[batch,new,12] logits"
NORM = f"{MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon = 0.001>"
# A layer: a stand-in for attention, its product, the residual sums, a norm's product, the head.
LAYER = f"a = Tanh(x) p = MatMul(a, w) n, , , t = {NORM} (p, x, g) q = MatMul(n, v) m = {NORM} (q, t, g)"
HEAD = "logits = MatMul(m, head)"
WEIGHTS = {"w": floats(32, 32), "v": floats(32, 32), "g": floats(32), "head": floats(32, 12)}


def layer(body: str = f"{LAYER} {HEAD}", signature: str = SIGNATURE, scheme: str = "int8-rowwise") -> ir.Model:
    model = graph(signature, body, WEIGHTS, (MICROSOFT,))
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None and value.name:
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), model.graph.inputs[0].shape
    KeepLastLogits()(model)
    if scheme != "fp32":
        QuantizeLinears(scheme, 127)(model)
        FuseIntoProducts()(model)
    return model


def test_only_the_rows_that_are_kept_are_computed() -> None:
    before, model = layer(), layer()
    assert KeepRows()(model).modified
    assert sorted(str(node.inputs[0].name) for node in model.graph if node.op_type == "Slice" and node.inputs[0]) == [
        "a",
        "x",
    ]
    for name in (NORMED_ROWWISE_MATMUL, ROWWISE_MATMUL):
        for node in model.graph:
            if node.op_type == name:
                assert [str(size) for size in node.outputs[0].shape or ()][:2] == ["batch", "kept"]
    x = floats(2, 5, 32)
    for keep in (1, 2, 5, 0):
        feeds = {"x": x, "logits_to_keep": np.array([keep])}
        (got,), (expected,) = compute(model, feeds), compute(before, feeds)
        assert got.shape == (2, keep or 5, 12)
        np.testing.assert_array_equal(got, expected)
    assert unchanged(KeepRows(), model)


def test_a_layer_with_other_readers_stays_whole() -> None:
    body = f"{LAYER} other = Exp(t) {HEAD}"
    assert unchanged(KeepRows(), layer(body, f"{SIGNATURE}, float[batch,new,32] other"))
    signature = SIGNATURE.replace(" logits", " logits, float[batch,new,32] t")
    assert unchanged(KeepRows(), layer(signature=signature))


def test_rows_are_cut_after_the_last_other_reader() -> None:
    """The first product has another reader, so rows are cut after it."""
    body = f"{LAYER} other = Exp(p) {HEAD}"
    signature = f"{SIGNATURE}, float[batch,new,32] other"
    before, model = (layer(body, signature) for _ in range(2))
    assert KeepRows()(model).modified
    assert str(one(model, NORMED_ROWWISE_MATMUL).outputs[0].shape[1]) == "kept"  # type: ignore[index]
    assert count(model, "Slice") == 2
    feeds = {"x": floats(2, 5, 32), "logits_to_keep": np.array([1])}
    for got, expected in zip(compute(model, feeds), compute(before, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scheme", ["fp32", "int8-tensor"])
def test_products_whose_rows_depend_on_each_other_stay(scheme: str) -> None:
    assert unchanged(KeepRows(), layer(scheme=scheme))
