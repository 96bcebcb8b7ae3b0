"""What becomes float16, and what must stay float32: positions, squares and sums, logits, scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.passes.graph import ATTENTION
from edgelm.export.passes.quantize_cache import QuantizeCache
from edgelm.export.passes.to_float16 import ToFloat16

from .test_passes import (
    ATTEND,
    BATCH,
    HIDDEN,
    NEW,
    PLAIN,
    Array,
    X,
    attention_graph,
    compute,
    count,
    floats,
    graph,
    initializers,
    one,
    projections,
    unchanged,
)

VOCABULARY = 40
SIGNATURE = "int64[batch,new] input_ids -> float[batch,new,{}] logits"
IDS = np.arange(BATCH * NEW).reshape(BATCH, NEW)
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Relative error of a float16 number, times the few roundings of these graphs.
TOLERANCE = 8 * 2.0**-11


def narrowed(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    """Run the pass, which must keep the logits' name, type and, but for float16's precision, values. Returns the values
    after it. feeds: without a cache."""
    (before,) = compute(model, feeds)
    assert ToFloat16()(model).modified
    (logits,) = model.graph.outputs
    assert (logits.name, logits.dtype) == ("logits", FLOAT)
    (after,) = compute(model, feeds)
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE * np.abs(before).max())
    assert unchanged(ToFloat16(), model)
    return after


def types(model: ir.Model, kind: str) -> list[ir.DataType | None]:
    """Types of the first input and the first output of the only node of an operator."""
    node = one(model, kind)
    assert node.inputs[0] is not None
    return [node.inputs[0].dtype, node.outputs[0].dtype]


def test_activations_and_weights_become_float16() -> None:
    weights = {"table": floats(VOCABULARY, HIDDEN), "w": floats(HIDDEN, 12), "wt": floats(12, 12)}
    body = """
        x = Gather(table, input_ids) h = MatMul(x, w) t = Tanh(h) turned = Transpose<perm=[1,0]>(wt)
        logits = MatMul(t, turned)
    """
    model = graph(SIGNATURE.format(12), body, weights)
    narrowed(model, {"input_ids": IDS})
    assert not initializers(model, FLOAT) and len(initializers(model, HALF)) == 3
    assert types(model, "Tanh") == types(model, "Transpose") == [HALF, HALF]
    assert types(model, "Cast") == [HALF, FLOAT], "the logits alone are cast"


def test_a_cast_to_float32_becomes_one_to_float16() -> None:
    body = "x = Gather(table, input_ids) c = Cast<to=1>(x) logits = Tanh(c)"
    model = graph(SIGNATURE.format(32), body, {"table": floats(VOCABULARY, HIDDEN)})
    narrowed(model, {"input_ids": IDS})
    assert types(model, "Tanh") == [HALF, HALF]


def test_the_lowest_float32_of_a_mask_becomes_the_lowest_float16() -> None:
    lowest = np.where(np.tri(NEW, dtype=bool), np.float32(0), np.finfo(np.float32).min)
    body = "x = Gather(table, input_ids) masked = Add(x, mask) logits = Softmax<axis=-1>(masked)"
    model = graph(SIGNATURE.format(NEW), body, {"table": floats(VOCABULARY, NEW), "mask": lowest})
    narrowed(model, {"input_ids": IDS})
    (mask,) = (array for array in initializers(model, HALF).values() if len(array) == NEW)
    assert mask.min() == np.finfo(np.float16).min


def test_positions_stay_float32_and_are_cast_where_they_meet_the_text() -> None:
    """In float16, 4,097 would be 4,096: another angle."""
    body = """
        x = Gather(table, input_ids) places = Cast<to=1>(position_ids) angles = Mul(places, step)
        turns = Cos(angles) turned = Mul(x, turns) again = Mul(turned, turns) logits = Tanh(again)
    """
    signature = "int64[batch,new] input_ids, int64[batch,new,1] position_ids -> float[batch,new,32] logits"
    model = graph(signature, body, {"table": floats(VOCABULARY, HIDDEN), "step": np.ones(HIDDEN, np.float32)})
    narrowed(model, {"input_ids": IDS, "position_ids": 4097 + 2 * IDS[..., None]})
    assert types(model, "Cos") == [FLOAT, FLOAT]
    assert count(model, "Cast") == 3, "positions to float32, the turns once to float16, the logits to float32"
    assert [array.shape for array in initializers(model, FLOAT).values()] == [(HIDDEN,)]


WIDE = {
    "Pow": "s = Pow(x, two) m = ReduceMean<keepdims=1>(s, axes) r = Sqrt(m) logits = Div(x, r)",
    "ReduceMean": "m = ReduceMean<keepdims=1>(x, axes) logits = Div(x, m)",
    "ReduceSum": "s = ReduceSum<keepdims=1>(x, axes) logits = Div(x, s)",
    "ReduceSumSquare": "s = ReduceSumSquare<keepdims=1>(x, axes) r = Sqrt(s) logits = Div(x, r)",
    "Exp": "y = Mul(x, small) e = Exp(y) f = Log(e) logits = Tanh(f)",
}


@pytest.mark.parametrize("kind", WIDE)
def test_operators_whose_results_exceed_float16_stay_float32(kind: str) -> None:
    """Squares of 300, sums of many numbers, and exp(12) are above 65,504."""
    weights = {
        "table": 3000 + 100 * floats(VOCABULARY, HIDDEN),
        "two": np.array(2, np.float32),
        "axes": np.array([-1]),
        "small": np.array(0.004, np.float32),
    }
    model = graph(SIGNATURE.format(32), f"x = Gather(table, input_ids) {WIDE[kind]}", weights)
    assert np.isfinite(narrowed(model, {"input_ids": IDS})).all()
    assert types(model, kind) == [FLOAT, FLOAT]


def test_a_weight_that_both_types_read_is_there_once_in_each() -> None:
    body = "x = Gather(table, input_ids) y = Mul(x, v) z = Add(y, v) s = Pow(z, v) logits = Tanh(s)"
    weights = {"table": np.abs(floats(VOCABULARY, HIDDEN)), "v": np.abs(floats(HIDDEN))}
    model = graph(SIGNATURE.format(32), body, weights)
    narrowed(model, {"input_ids": IDS})
    assert list(initializers(model, FLOAT)) == ["v"]
    assert len([array for array in initializers(model, HALF).values() if array.shape == (HIDDEN,)]) == 1


@pytest.mark.parametrize("readers", ["y = Mul(x, c) s = Pow(y, c)", "s = Pow(x, c) y = Mul(s, x) z = Mul(x, c)"])
def test_a_computed_constant_that_both_types_read_stays_float32(readers: str) -> None:
    body = f"x = Gather(table, input_ids) c = Neg(v) {readers} logits = Add(y, {'s' if 'z' not in readers else 'z'})"
    weights = {"table": 1 + np.abs(floats(VOCABULARY, HIDDEN)), "v": np.abs(floats(HIDDEN))}
    model = graph(SIGNATURE.format(32), body, weights)
    narrowed(model, {"input_ids": IDS})
    assert types(model, "Neg") == [FLOAT, FLOAT]


def test_integers_that_come_from_the_text_stay_integers() -> None:
    body = """
        x = Gather(table, input_ids) sizes = Shape(x) y = Reshape(x, sizes) best = ArgMax<axis=-1, keepdims=1>(y)
        number = Cast<to=1>(best) logits = Mul(y, number)
    """
    model = graph(SIGNATURE.format(8), body, {"table": floats(VOCABULARY, 8)})
    narrowed(model, {"input_ids": IDS})
    assert types(model, "Shape")[0] == HALF, "needs no cast"
    assert types(model, "ArgMax") == [FLOAT, ir.DataType.INT64]
    assert types(model, "Mul") == [HALF, HALF]


def cache_graph(present: str) -> ir.Model:
    """onnx's text form does not accept names with dots."""
    signature = "int64[batch,new] input_ids, float[batch,1,past,32] past -> "
    outputs = "float[batch,new,32] logits, float[batch,1,total,32] present"
    body = f"x = Gather(table, input_ids) e = Unsqueeze(x, one) {present} logits = Tanh(x)"
    weights = {"table": floats(VOCABULARY, HIDDEN), "one": np.array([1])}
    model = graph(signature + outputs, body, weights)
    model.graph.inputs[1].name, model.graph.outputs[1].name = "past_key_values.0.key", "present.0.key"
    return model


def test_the_cache_becomes_float16() -> None:
    model = cache_graph("present = Concat<axis=2>(past, e)")
    past = floats(BATCH, 1, 3, HIDDEN)
    before = compute(model, {"input_ids": IDS, "past_key_values.0.key": past})
    assert ToFloat16()(model).modified
    assert [value.dtype for value in (model.graph.inputs[1], model.graph.outputs[1])] == [HALF, HALF]
    logits, present = compute(model, {"input_ids": IDS, "past_key_values.0.key": past.astype(np.float16)})
    assert (logits.dtype, present.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(present, before[1].astype(np.float16))
    np.testing.assert_allclose(logits, before[0], atol=TOLERANCE)


def test_a_cache_that_stays_float32_is_refused() -> None:
    model = cache_graph("c = Concat<axis=2>(past, e) present = Exp(c)")
    with pytest.raises(ir.passes.PostconditionError, match=r"present\.0\.key is still FLOAT"):
        ToFloat16()(model)


def test_scales_of_an_int8_cache_stay_float32() -> None:
    model = attention_graph(PLAIN + ATTEND.format(out="y", q="q", k="k", v="v"), projections(), inputs=X)
    sides = {side: np.full((1, 16), 5, np.float32) for side in ("0.key", "0.value")}
    QuantizeCache(sides)(model)
    assert ToFloat16().apply(model)
    attention = one(model, ATTENTION)
    assert [value.dtype for value in attention.inputs[12:14] if value is not None] == [FLOAT, FLOAT]
    assert [value.dtype for value in attention.inputs[:3] if value is not None] == [HALF] * 3


NOTHING_OF_THE_TEXT = {
    "positions": ("int64[batch,new] position_ids -> float[batch,new] y", "p = Cast<to=1>(position_ids) y = Cos(p)"),
    "integers": ("int64[batch,new] input_ids -> int64[batch,new] y", "y = Add(input_ids, input_ids)"),
    "a table of positions": (
        "int64[batch,new] position_ids -> float[batch,new,8] y",
        "p = Gather(table, position_ids) y = Tanh(p)",
    ),
}


@pytest.mark.parametrize(("signature", "body"), NOTHING_OF_THE_TEXT.values(), ids=NOTHING_OF_THE_TEXT.keys())
def test_what_does_not_depend_on_the_text_is_left(signature: str, body: str) -> None:
    weights = {"table": floats(VOCABULARY, 8)} if "table" in body else {}
    model = graph(signature, body, weights)
    assert unchanged(ToFloat16(), model)
