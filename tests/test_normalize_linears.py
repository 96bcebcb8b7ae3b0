"""`Gemm` becomes MatMul and Add wherever the two compute the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.passes.normalize_linears import NormalizeLinears

from .test_passes import BATCH, HIDDEN, NEW, Array, applied, floats, graph, kinds, unchanged

OUTPUTS = 12
FLAT = "float[rows,32] x -> float[rows,12] y"
DEEP = "float[batch,new,32] x -> float[batch,new,12] y"
# As traced: two axes for Gemm, and the shape of the input back behind it.
DEEP_BODY = """
    flat = Reshape(x, two_axes) {gemm}
    sizes = Shape<start=0, end=2>(x) back = Concat<axis=0>(sizes, width) y = Reshape(g, back)
"""
GEMMS = {
    "transposed, with bias": ("g = Gemm<transB=1>({x}, wt, b)", ["Add", "MatMul", "Transpose"]),
    "transposed": ("g = Gemm<transB=1>({x}, wt)", ["MatMul", "Transpose"]),
    "with bias": ("g = Gemm({x}, w, b)", ["Add", "MatMul"]),
    "plain": ("g = Gemm<alpha=1.0, beta=1.0>({x}, w)", ["MatMul"]),
}


def weights() -> dict[str, Array]:
    return {
        "w": floats(HIDDEN, OUTPUTS),
        "wt": floats(OUTPUTS, HIDDEN),
        "b": floats(OUTPUTS),
        "row": floats(1, OUTPUTS),
        "two_axes": np.array([-1, HIDDEN]),
        "width": np.array([OUTPUTS]),
        "parts": np.array([-1, 4, 3]),
    }


@pytest.mark.parametrize(("gemm", "left"), GEMMS.values(), ids=GEMMS.keys())
def test_case_1_gemm_between_two_reshapes_takes_their_place(gemm: str, left: list[str]) -> None:
    model = graph(DEEP, DEEP_BODY.format(gemm=gemm.format(x="flat")), weights())
    applied(NormalizeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert kinds(model) == left


@pytest.mark.parametrize(("gemm", "left"), GEMMS.values(), ids=GEMMS.keys())
def test_case_2_gemm_of_two_axes(gemm: str, left: list[str]) -> None:
    model = graph(FLAT, gemm.format(x="x").replace("g =", "y ="), weights())
    applied(NormalizeLinears(), model, {"x": floats(7, HIDDEN)})
    assert kinds(model) == left


def test_each_gemm_of_several_is_replaced() -> None:
    body = "h = Gemm<transB=1>(x, wt, b) t = Tanh(h) y = Gemm(t, wt, v)"
    model = graph("float[rows,32] x -> float[rows,32] y", body, {**weights(), "v": floats(HIDDEN)})
    applied(NormalizeLinears(), model, {"x": floats(7, HIDDEN)})
    assert kinds(model) == ["Add", "Add", "MatMul", "MatMul", "Tanh", "Transpose"]


# Must not be replaced.
OTHERS = {
    "alpha": "y = Gemm<alpha=2.0>(x, w, b)",
    "beta": "y = Gemm<beta=0.5>(x, w, b)",
    "a matrix that is computed": "e = Exp(w) y = Gemm(x, e, b)",
    "a bias that is computed": "e = Exp(b) y = Gemm(x, w, e)",
    "a bias of two axes": "y = Gemm(x, w, row)",
}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS.keys())
def test_other_products_are_left(body: str) -> None:
    assert unchanged(NormalizeLinears(), graph(FLAT, body, weights()))


def test_a_transposed_input_is_left() -> None:
    model = graph("float[32,rows] x -> float[rows,12] y", "y = Gemm<transA=1>(x, w, b)", weights())
    assert unchanged(NormalizeLinears(), model)


# Gemm is replaced by case 2, and the Reshapes around it stay, since they do more than to join two axes and part them.
AROUND = {
    "rows that are cut in two": ("float[batch,new,64] x", "float[batch,new,24] y", [BATCH, NEW, 2 * OUTPUTS]),
    "axes that swap": ("float[batch,new,32] x", "float[new,batch,12] y", [NEW, BATCH, OUTPUTS]),
}


@pytest.mark.parametrize(("before", "after", "sizes"), AROUND.values(), ids=AROUND.keys())
def test_reshapes_that_do_more_stay(before: str, after: str, sizes: list[int]) -> None:
    body = "flat = Reshape(x, two_axes) g = Gemm(flat, w, b) y = Reshape(g, sizes)"
    model = graph(f"{before}, int64[3] sizes -> {after}", body, weights())
    x = floats(BATCH, NEW, 2 * HIDDEN if "64" in before else HIDDEN)
    applied(NormalizeLinears(), model, {"x": x, "sizes": np.array(sizes)})
    assert kinds(model) == ["Add", "MatMul", "Reshape", "Reshape"]


def test_axes_of_unknown_sizes_are_not_taken_as_equal() -> None:
    body = "flat = Reshape(x, two_axes) g = Gemm(flat, w, b) y = Reshape(g, sizes)"
    model = graph("float[?,?,32] x, int64[3] sizes -> float[?,?,12] y", body, weights())
    model.graph.outputs[0].shape = ir.Shape([None, None, OUTPUTS])  # shape inference names unknown sizes
    applied(NormalizeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN), "sizes": np.array([NEW, BATCH, OUTPUTS])})
    assert kinds(model) == ["Add", "MatMul", "Reshape", "Reshape"]


def test_another_operator_behind_stays() -> None:
    body = "flat = Reshape(x, two_axes) g = Gemm(flat, w, b) y = Add(g, more)"
    model = graph("float[1,5,32] x -> float[1,5,12] y", body, {**weights(), "more": floats(1, 5, OUTPUTS)})
    applied(NormalizeLinears(), model, {"x": floats(1, 5, HIDDEN)})
    assert kinds(model) == ["Add", "Add", "MatMul", "Reshape"]


def test_one_reshape_behind_stays() -> None:
    model = graph(FLAT.replace("rows,12", "rows,4,3"), "g = Gemm(x, w) y = Reshape(g, parts)", weights())
    applied(NormalizeLinears(), model, {"x": floats(7, HIDDEN)})
    assert kinds(model) == ["MatMul", "Reshape"]


def test_a_result_of_gemm_that_others_read_keeps_its_two_axes() -> None:
    body = DEEP_BODY.format(gemm="g = Gemm(flat, w, b)") + "other = Tanh(g)"
    model = graph(f"{DEEP}, float[rows,12] other", body, weights())
    applied(NormalizeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert kinds(model).count("Reshape") == 2 and "Gemm" not in kinds(model)
