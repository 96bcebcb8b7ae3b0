"""A bias after a row-wise product is fused into its call, whatever the product's kind, and no bit changes."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.export.passes.functions import BIASED, NORMED_ROWWISE_MATMUL, ROWWISE_MATMUL, WIDE
from edgelm.export.passes.fuse_biases import FuseBiases
from edgelm.export.passes.fuse_into_products import FuseIntoProducts
from edgelm.export.passes.widen_activations import WidenActivations

from .test_fuse_into_products import NORM, SUM, norm_weights, product_graph
from .test_passes import Array, compute, count, floats, kinds, one, unchanged

SIGNATURE = "float[batch,new,32] x -> float[batch,new,12] y"


def weights(bias: Array) -> dict[str, Array]:
    return {"w": floats(32, 12), "c": bias}


@pytest.mark.parametrize("body", ["p = MatMul(x, w) y = Add(p, c)", "p = MatMul(x, w) y = Add(c, p)"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_bias_goes_into_its_product(body: str, wide: bool) -> None:
    constants = weights(floats(12))
    before, model = (product_graph(SIGNATURE, body, constants) for _ in range(2))
    assert FuseBiases()(model).modified
    assert kinds(model) == [BIASED + ROWWISE_MATMUL]
    if wide:
        for graph in (before, model):
            assert WidenActivations(["w"])(graph).modified
        assert kinds(model) == [BIASED + ROWWISE_MATMUL + WIDE]
    feeds = {"x": floats(2, 5, 32)}
    np.testing.assert_array_equal(compute(model, feeds)[0], compute(before, feeds)[0])
    assert unchanged(FuseBiases(), model)


def test_a_product_of_a_norm_keeps_its_sum() -> None:
    body = f"{NORM} p = MatMul(n, w) y = Add(p, c)"
    signature = f"{SUM}, float[batch,new,32] t"
    constants = {**norm_weights(), "c": floats(12)}
    before, model = (product_graph(signature, body, constants) for _ in range(2))
    for graph in (before, model):
        FuseIntoProducts()(graph)
    assert FuseBiases()(model).modified
    call = one(model, BIASED + NORMED_ROWWISE_MATMUL)
    assert call.attributes.get_float("epsilon", 0) == pytest.approx(0.001)
    assert [value.name for value in model.graph.outputs] == ["y", "t"]
    feeds = {"a": floats(2, 5, 32), "b": floats(2, 5, 32)}
    for got, expected in zip(compute(model, feeds), compute(before, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


LEFT = {
    "another reader": ("p = MatMul(x, w) q = Add(p, c) y = Add(p, q)", floats(12)),
    "one value for all": ("p = MatMul(x, w) y = Add(p, c)", floats(1)),
    "no constant": ("p = MatMul(x, w) d = Exp(c) y = Add(p, d)", floats(12)),
    "a matrix": ("p = MatMul(x, w) y = Add(p, c)", floats(1, 12)),
    "another operator": ("p = MatMul(x, w) y = Mul(p, c)", floats(12)),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_additions_stay(case: str) -> None:
    body, bias = LEFT[case]
    model = product_graph(SIGNATURE, body, weights(bias))
    assert unchanged(FuseBiases(), model)
    assert count(model, ROWWISE_MATMUL) == 1
