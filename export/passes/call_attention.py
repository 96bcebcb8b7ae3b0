"""Attention becomes a call of the function `edgelm::GroupQueryAttention`, which a kernel may compute.

A node that has an attribute or an input that the function does not stays com.microsoft's. Runs where what attention
reads is rounded already, its cache or its activations: a kernel rounds too, by a small part of that. Graphs that
compute in floats keep onnxruntime's attention.
"""

from __future__ import annotations

import onnx_ir as ir

from .functions import ATTENTION_ATTRIBUTES, make_call
from .graph import ATTENTION, GraphPass, nodes_of

_UNKNOWN_INPUTS = (9, 10, 11)  # position_ids, attention_bias, head_sink


class CallAttention(GraphPass):
    """See the module."""

    def apply(self, model: ir.Model) -> bool:
        callable_nodes = [node for node in nodes_of(model, ATTENTION) if _is_callable(node)]
        for node in callable_nodes:
            make_call(model, node, ATTENTION)
        return bool(callable_nodes)


def _is_callable(attention: ir.Node) -> bool:
    """Whether the function means what the node does."""
    known = all(name in ATTENTION_ATTRIBUTES for name in attention.attributes)
    return known and all(value is None for value in attention.inputs[_UNKNOWN_INPUTS[0] : _UNKNOWN_INPUTS[-1] + 1])
