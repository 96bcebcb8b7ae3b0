"""The number of rows to keep is subtracted from a 0 that comes from a shape, so that it is computed on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.export.passes.graph import producer
from edgelm.export.passes.keep_last_logits import KeepLastLogits
from edgelm.export.passes.keep_on_host import KeepOnHost
from edgelm.export.passes.last_logits_only import LastLogitsOnly

from .test_passes import BATCH, HIDDEN, NEW, applied, assert_close, compute, count, floats, graph, one, unchanged

SIGNATURE = "int64[batch,new] input_ids -> float[batch,new,40] logits"
BODY = "x = Gather(table, input_ids) logits = MatMul(x, w)"
IDS = np.arange(BATCH * NEW).reshape(BATCH, NEW)


@pytest.mark.parametrize("keep", [0, 1, 2, NEW])
def test_the_same_rows_are_kept(keep: int) -> None:
    model = graph(SIGNATURE, BODY, {"table": floats(40, HIDDEN), "w": floats(HIDDEN, 40)})
    (everything,) = compute(model, {"input_ids": IDS})
    KeepLastLogits()(model)
    feeds = {"input_ids": IDS, "logits_to_keep": np.array([keep])}
    applied(KeepOnHost(), model, feeds)
    assert_close(compute(model, feeds), [everything[:, -keep:]])


def test_the_number_is_computed_from_a_shape() -> None:
    model = graph(SIGNATURE, BODY, {"table": floats(40, HIDDEN), "w": floats(HIDDEN, 40)})
    KeepLastLogits()(model)
    assert KeepOnHost()(model).modified
    assert not count(model, "Neg")
    start = producer(one(model, "Slice").inputs[1], "Sub")
    assert start is not None
    nothing, keep = start.inputs
    assert keep is not None and keep.name == "logits_to_keep" and keep.is_graph_input()
    zero = producer(nothing, "Sub")
    assert zero is not None and zero.inputs[0] is zero.inputs[1]
    shape = producer(zero.inputs[0], "Shape")
    assert shape is not None and shape.inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize("given", ["other", "twice"])
def test_other_negations_are_left(given: str) -> None:
    body = "twice = Add(logits_to_keep, logits_to_keep) all = Add(twice, other) n = Neg({}) y = Mul(n, all)"
    signature = "int64[batch,new] input_ids, int64[1] logits_to_keep, int64[1] other -> int64[1] y"
    assert unchanged(KeepOnHost(), graph(signature, body.format(given)))


def test_a_constant_number_of_rows_is_left() -> None:
    model = graph(SIGNATURE, BODY, {"table": floats(40, HIDDEN), "w": floats(HIDDEN, 40)})
    KeepLastLogits()(model)
    LastLogitsOnly()(model)
    assert count(model, "Neg") == 1
    assert unchanged(KeepOnHost(), model)
