"""Queries, keys and values of a layer come from one MatMul, whose output goes into the attention operator as it is.

Case: all three inputs of GroupQueryAttention are linear layers over the same value (biases are put side by side).
Layers that norm queries or keys in between, or rotate outside of the operator, keep three inputs.
"""

from __future__ import annotations

import onnx_ir as ir

from .graph import ATTENTION, GraphPass, nodes_of
from .linear import linear_of, merge


class PackAttentionInputs(GraphPass):
    """See the module."""

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for attention in nodes_of(model, ATTENTION):
            modified |= _pack(model, attention)
        return modified


def _pack(model: ir.Model, attention: ir.Node) -> bool:
    linears = [linear for linear in map(linear_of, attention.inputs[:3]) if linear is not None]
    if len(linears) < 3 or any(linear.input is not linears[0].input for linear in linears):
        return False
    attention.replace_input_with(0, merge(model, linears, attention))
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    return True
