"""Attention becomes a call of the function `edgelm::GroupQueryAttention`, which a kernel may compute."""

from __future__ import annotations

import onnx_ir as ir

from .attention_functions import ATTENTION_ATTRIBUTES
from .functions import make_call
from .graph import ATTENTION, KEPT_ATTENTION, MICROSOFT, GraphPass, nodes_of, only_user, replace_value
from .keep_rows import keeps_last

_UNKNOWN_INPUTS = (9, 10, 11)  # position_ids, attention_bias, head_sink
_START = 14  # `start` of the function that keeps rows: behind all inputs of the other function
_CACHE_PREFIXES = ("past_key_values.", "present.")


class CallAttention(GraphPass):
    """Attention becomes a call of the function `edgelm::GroupQueryAttention`, which a kernel may compute.

    A node with an attribute or an input that the function lacks stays com.microsoft's. Runs only if attention's cache
    or activations are rounded already: a kernel rounds too, by a small part of that. Float graphs keep onnxruntime's
    attention. The last attention, of which `KeepRows` keeps a part of the rows, becomes a call of
    `edgelm::KeptGroupQueryAttention`, which computes only those.

    If all attention became calls, the graph leaves the row length of an INT8 cache open: a head's values, with or
    without a scale behind them, as kernels keep them (`kernels/src/attention.h`).
    """

    def apply(self, model: ir.Model) -> bool:
        callable_nodes = [node for node in nodes_of(model, ATTENTION) if _is_callable(node)]
        for node in callable_nodes:
            user = only_user(node.outputs[0])
            if user is not None and keeps_last(user):
                _take_in(node, user)
                make_call(model, node, KEPT_ATTENTION)
            else:
                make_call(model, node, ATTENTION)
        if callable_nodes and calls_all_attention(model):
            _open_rows(model)
        return bool(callable_nodes)


def calls_all_attention(model: ir.Model) -> bool:
    """Whether all attention of a graph is, or would become, calls of the function."""
    return all(_is_callable(node) for node in nodes_of(model, ATTENTION, MICROSOFT))


def _open_rows(model: ir.Model) -> None:
    """Make the last axis of each part of an INT8 cache a symbol."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name.startswith(_CACHE_PREFIXES) and value.dtype == ir.DataType.INT8:
            assert value.shape is not None, "a cache has a shape"
            part = name.split(".", 1)[1]
            value.shape = ir.Shape([*value.shape[:-1], f"{part}.row"])


def _take_in(attention: ir.Node, cut: ir.Node) -> None:
    """Merge a Slice into attention: only the rows that it keeps are computed."""
    attention.resize_inputs(_START + 1)
    attention.replace_input_with(_START, cut.inputs[1])
    attention.outputs[0].shape = cut.outputs[0].shape
    replace_value(cut.outputs[0], attention.outputs[0])


def _is_callable(attention: ir.Node) -> bool:
    """Whether the function computes the same as the node."""
    known = all(name in ATTENTION_ATTRIBUTES for name in attention.attributes)
    return known and all(value is None for value in attention.inputs[_UNKNOWN_INPUTS[0] : _UNKNOWN_INPUTS[-1] + 1])
