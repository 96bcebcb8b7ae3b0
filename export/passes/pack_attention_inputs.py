"""Compute queries, keys and values of a layer by one MatMul, whose output goes directly into the attention operator."""

from __future__ import annotations

import onnx_ir as ir

from .graph import ATTENTION, GraphPass, nodes_of, producer
from .linear import linear_of, merge


class PackAttentionInputs(GraphPass):
    """Cases:
    1. the three inputs of GroupQueryAttention are linear layers over the same value: they are merged, with biases side
    by side
    2. the three inputs are the three parts of one Split, in order: the Split is removed
    Layers that norm queries or keys in between, or rotate them outside of the operator, keep three inputs.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for attention in nodes_of(model, ATTENTION):
            modified |= _pack(model, attention)
        return modified


def _pack(model: ir.Model, attention: ir.Node) -> bool:
    packed = _split_source(attention) or _merged(model, attention)
    if packed is None:
        return False
    attention.replace_input_with(0, packed)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    return True


def _merged(model: ir.Model, attention: ir.Node) -> ir.Value | None:
    linears = [linear for linear in map(linear_of, attention.inputs[:3]) if linear is not None]
    if len(linears) < 3 or any(linear.input is not linears[0].input for linear in linears):
        return None
    return merge(model, linears, attention)


def _split_source(attention: ir.Node) -> ir.Value | None:
    split = producer(attention.inputs[0], "Split")
    if split is None or split.attributes.get_int("axis", 0) not in (-1, 2) or len(split.outputs) != 3:
        return None
    return split.inputs[0] if list(split.outputs) == list(attention.inputs[:3]) else None
