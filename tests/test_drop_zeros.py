"""Additions of zeros are removed, those of anything else stay."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.export.passes.drop_zeros import DropZeros

from .test_passes import BATCH, HIDDEN, NEW, Array, applied, compute, floats, graph, kinds, unchanged

SIGNATURE = "float[batch,new,32] x -> float[batch,new,32] y"
VECTOR = {"zeros": np.zeros(HIDDEN, np.float32)}
NOTHING = {"none": np.array(0, np.float32), "sizes": np.array([1, 1, HIDDEN])}
ZEROS: dict[str, tuple[str, dict[str, Array]]] = {
    "a vector": ("y = Add(a, zeros)", VECTOR),
    "a vector in front": ("y = Add(zeros, a)", VECTOR),
    "one number": ("y = Add(a, none)", {"none": np.array(0, np.float32)}),
    "behind Expand": ("s = Shape(x) z = Expand(none, s) y = Add(a, z)", NOTHING),
    "ConstantOfShape without a value": ("z = ConstantOfShape(sizes) y = Add(a, z)", NOTHING),
    "ConstantOfShape with zero": ("z = ConstantOfShape<value = float[1] {0}>(sizes) y = Add(a, z)", NOTHING),
    "Expand of ConstantOfShape": (
        "s = Shape(x) c = ConstantOfShape(sizes) z = Expand(c, s) y = Add(a, z)",
        NOTHING,
    ),
}


@pytest.mark.parametrize(("body", "weights"), ZEROS.values(), ids=ZEROS.keys())
def test_zeros_are_dropped_with_what_made_them(body: str, weights: dict[str, Array]) -> None:
    model = graph(SIGNATURE, f"a = Tanh(x) {body}", weights)
    applied(DropZeros(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert kinds(model) == ["Tanh"]
    assert not model.graph.initializers


def test_each_of_several_sums_is_dropped() -> None:
    model = graph(SIGNATURE, "a = Tanh(x) b = Add(a, zeros) c = Add(zeros, b) d = Exp(c) y = Mul(c, d)", VECTOR)
    applied(DropZeros(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert kinds(model) == ["Exp", "Mul", "Tanh"]


@pytest.mark.parametrize(
    ("outputs", "body", "left"),
    [
        ("a, float[batch,new,32] y", "a = Tanh(x) y = Add(a, zeros)", ["Identity", "Tanh"]),
        ("y, float[batch,new,32] z", "y = Add(x, zeros) z = Tanh(x)", ["Identity", "Tanh"]),
    ],
    ids=["of another output", "of an input"],
)
def test_an_output_that_is_the_sum_keeps_its_name(outputs: str, body: str, left: list[str]) -> None:
    model = graph(f"float[batch,new,32] x -> float[batch,new,32] {outputs}", body, VECTOR)
    applied(DropZeros(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert kinds(model) == left


# Larger than `_MOST_ELEMENTS`: such initializers are matrices, which are not read.
ROWS = (1 << 17) // HIDDEN + 1
NO_ZEROS: dict[str, tuple[str, str, dict[str, Array]]] = {
    "a single number": (SIGNATURE, "y = Add(a, v)", {"v": np.eye(1, HIDDEN, dtype=np.float32)[0] * 1e-30}),
    "not a number": (SIGNATURE, "y = Add(a, v)", {"v": np.full(HIDDEN, np.nan, np.float32)}),
    "ones behind Expand": (SIGNATURE, "s = Shape(x) z = Expand(v, s) y = Add(a, z)", {"v": np.array(1, np.float32)}),
    "ConstantOfShape with one": (
        SIGNATURE,
        "z = ConstantOfShape<value = float[1] {1}>(v) y = Add(a, z)",
        {"v": np.array([1, HIDDEN])},
    ),
    "zeros that are computed": (SIGNATURE, "z = Sub(x, x) y = Add(a, z)", {}),
    "zeros that are subtracted from": (SIGNATURE, "y = Sub(v, a)", {"v": np.zeros(HIDDEN, np.float32)}),
    "zeros that give the sum its shape": (
        "float[32] x -> float[4,32] y",
        "y = Add(a, v)",
        {"v": np.zeros((4, HIDDEN), np.float32)},
    ),
    "a value of unknown shape": (
        "float[batch,new,32] x, int64[k] shape -> float[batch,new,32] y",
        "r = Reshape(a, shape) y = Add(r, v)",
        {"v": np.zeros(HIDDEN, np.float32)},
    ),
    "a large matrix": (
        f"float[{ROWS},32] x -> float[{ROWS},32] y",
        "y = Add(a, v)",
        {"v": np.zeros((ROWS, HIDDEN), np.float32)},
    ),
}


@pytest.mark.parametrize(("signature", "body", "weights"), NO_ZEROS.values(), ids=NO_ZEROS.keys())
def test_other_sums_are_left(signature: str, body: str, weights: dict[str, Array]) -> None:
    assert unchanged(DropZeros(), graph(signature, f"a = Tanh(x) {body}", weights))


def test_zeros_that_others_read_stay_for_them() -> None:
    model = graph(SIGNATURE, "a = Tanh(x) b = Add(a, zeros) c = Max(b, zeros) y = Add(b, c)", VECTOR)
    x = floats(BATCH, NEW, HIDDEN)
    applied(DropZeros(), model, {"x": x})
    assert kinds(model) == ["Add", "Max", "Tanh"]
    (got,) = compute(model, {"x": x})
    np.testing.assert_allclose(got, np.tanh(x) + np.maximum(np.tanh(x), 0), rtol=1e-5, atol=1e-6)
