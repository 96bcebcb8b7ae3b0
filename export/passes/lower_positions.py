"""`edgelm::Positions`, the trace's symbol for the positions of the new tokens, becomes standard operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight, nodes_of, replace_value

POSITIONS = "Positions"
POSITIONS_DOMAIN = "edgelm"


class LowerPositions(GraphPass):
    """`edgelm::Positions`, the trace's symbol for the positions of the new tokens, becomes standard operators.

    Position of token i of a row: (tokens of the row in all) - (new tokens) + i, int64 (batch, new). The attention mask
    has ones for all tokens of the row, cached and new; rows are filled from the left. A padding row behind the last
    token of a full context gets the last position, since a table of learned positions has no row for it. The numbers
    -(new tokens) to -1 come from `Range`, which reads counts on the CPU and writes numbers on a GPU; other operators
    would wait for a copy of the count.
    """

    def __init__(self, context_length: int) -> None:
        self._last = context_length - 1

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for count, node in enumerate(nodes_of(model, POSITIONS, POSITIONS_DOMAIN)):
            _lower(model, node, f"positions.{count}", self._last)
            modified = True
        model.graph.opset_imports.pop(POSITIONS_DOMAIN, None)
        return modified

    def ensures(self, model: ir.Model) -> None:
        if any(True for _ in nodes_of(model, POSITIONS, POSITIONS_DOMAIN)):
            raise ir.passes.PostconditionError("a Positions node is left")


def _lower(model: ir.Model, node: ir.Node, prefix: str, last: int) -> None:
    input_ids, mask = node.inputs
    zero = add_weight(model, "positions.zero", np.array(0, np.int64))
    one = add_weight(model, "positions.one", np.array(1, np.int64))
    axis = add_weight(model, "positions.axis", np.array([1], np.int64))
    op = Builder(model, node, prefix)
    new = op("Squeeze", op("Shape", input_ids, start=1, end=2))
    counts = op("ReduceSum", mask, axis, keepdims=1)
    end = add_weight(model, "positions.last", np.array(last, np.int64))
    positions = op("Min", op("Add", counts, op("Range", op("Neg", new), zero, one)), end, like=node.outputs[0])
    replace_value(node.outputs[0], positions)
