"""A second output, `next_tokens` int64 (batch, kept): for each row of logits the most likely token, the lowest id among
equals. Greedy decoding on a GPU then copies one number back for a token, and not a row of the vocabulary."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight

OUTPUT_NAME = "next_tokens"


class PickTokens(GraphPass):
    """A second output, `next_tokens` int64 (batch, kept): for each row of logits the most likely token, the lowest id
    among equals. Greedy decoding on a GPU then copies one number back for a token, and not a row of the vocabulary.

    On GPUs, `ArgMax` does not define which of equal values it takes, and `ReduceMax` of this operator set has no
    kernel. So `TopK` finds the largest value, and `TopK` again the smallest id with that value. If all logits are NaN,
    the result is still an id.

    `TopK` over a whole vocabulary uses only one processor of a GPU, so each has two steps: over pieces of a row, then
    over their results.
    """

    def requires(self, model: ir.Model) -> None:
        logits = model.graph.outputs[0]
        if logits.shape is None or not isinstance(logits.shape[-1], int):
            raise ir.passes.PreconditionError("the logits have no fixed number of tokens")

    def apply(self, model: ir.Model) -> bool:
        logits = model.graph.outputs[0]
        assert logits.shape is not None, "required"
        vocabulary = logits.shape[-1]
        assert isinstance(vocabulary, int), "required"
        last = list(model.graph)[-1]
        op = Builder(model, last, OUTPUT_NAME)
        one = add_weight(model, "pick.one", np.array([1], np.int64))
        ids = add_weight(model, "pick.ids", np.arange(vocabulary, dtype=np.int64))
        none = add_weight(model, "pick.none", np.array(vocabulary - 1, np.int64))
        axis = add_weight(model, "pick.axis", np.array([-1], np.int64))
        pieces = _pieces(model, vocabulary)
        largest = _first(op, logits, (one, axis, pieces))
        candidates = op("Where", op("Less", logits, largest), none, ids)
        smallest = _first(op, candidates, (one, axis, pieces), largest=0)
        tokens = op("Squeeze", smallest, axis)
        tokens.name, tokens.type = OUTPUT_NAME, ir.TensorType(ir.DataType.INT64)
        tokens.shape = ir.Shape(list(logits.shape)[:-1])
        model.graph.outputs.append(tokens)
        model.graph.sort()
        return True


def _first(
    op: Builder, values: ir.Value, constants: tuple[ir.Value, ir.Value, ir.Value | None], **attributes: int
) -> ir.Value:
    """The largest or the smallest value of each row, (batch, kept, 1)."""
    one, axis, pieces = constants
    if pieces is not None:
        best = op.node("TopK", [op("Reshape", values, pieces), one], attributes, outputs=2)[0]
        values = op("Squeeze", best, axis)
    return op.node("TopK", [values, one], attributes, outputs=2)[0]


def _pieces(model: ir.Model, vocabulary: int) -> ir.Value | None:
    """The shape of rows cut into pieces, about as many as a piece has values; None if no size divides a row."""
    size = max(size for size in range(1, int(vocabulary**0.5) + 1) if vocabulary % size == 0)
    if size == 1:
        return None
    return add_weight(model, "pick.pieces", np.array([0, 0, vocabulary // size, size], np.int64))
