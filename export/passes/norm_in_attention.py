"""Move norms of queries and keys into the call of attention, where a kernel norms each head before it rotates it."""

from __future__ import annotations

import onnx_ir as ir

from .attention_functions import NORMED
from .functions import EDGELM, make_call
from .graph import GraphPass, nodes_of, only_user, producer


class NormInAttention(GraphPass):
    """Case: a call of `edgelm::GroupQueryAttention`, or the one that keeps rows. Its value is the third part of a
    Split; its query and key are root mean square norms by heads (weights of one head, the same epsilon) of the first
    two parts -> NormedGroupQueryAttention of the Split's input. Around a norm, heads may be transposed in front of the
    positions and back, as models write it. Norms over all heads together stay.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for name, normed in NORMED.items():
            for attention in nodes_of(model, name, EDGELM):
                modified |= _fuse(model, attention, normed)
        return modified


def _fuse(model: ir.Model, attention: ir.Node, name: str) -> bool:
    query, key = (_norm_of_heads(value) for value in attention.inputs[:2])
    if query is None or key is None or _epsilon(query) != _epsilon(key):
        return False
    parts = [_source(query), _source(key), attention.inputs[2]]
    split = producer(parts[2], "Split")
    if split is None or list(split.outputs) != parts or not _has_widths(split, attention, query):
        return False
    for index, value in enumerate((split.inputs[0], query.inputs[1], key.inputs[1])):
        attention.replace_input_with(index, value)
    attention.attributes["epsilon"] = ir.AttrFloat32("epsilon", _epsilon(query))
    make_call(model, attention, name)
    return True


def _has_widths(split: ir.Node, attention: ir.Node, norm: ir.Node) -> bool:
    """Whether the parts of a Split along the last axis consist of heads of the norm's size."""
    size = norm.outputs[0].shape[-1] if norm.outputs[0].shape is not None else None
    heads = [attention.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
    widths = [value.shape[-1] if value.shape is not None else None for value in split.outputs]
    along_last = split.attributes.get_int("axis", 0) in (-1, 2)
    return along_last and isinstance(size, int) and widths == [count * size for count in heads]


def _epsilon(norm: ir.Node) -> float:
    return norm.attributes.get_float("epsilon", 1e-5)


def _norm_of_heads(value: ir.Value | None) -> ir.Node | None:
    """The norm by heads that computes a value (batch, new, heads * size), over (batch, new, heads, size) or,
    transposed, (batch, heads, new, size)."""
    flat = producer(value, "Reshape")
    if flat is None or value is None or only_user(value) is None or len(value.shape or ()) != 3:
        return None
    norm = producer(_unmoved(flat.inputs[0]), "SimplifiedLayerNormalization")
    if norm is None or norm.inputs[0] is None or norm.inputs[1] is None or norm.inputs[1].const_value is None:
        return None
    heads = norm.inputs[0].shape
    over_heads = heads is not None and len(heads) == 4 and list(norm.inputs[1].shape or ()) == [heads[-1]]
    return norm if over_heads and norm.attributes.get_int("axis", -1) in (-1, 3) else None


def _source(norm: ir.Node) -> ir.Value | None:
    """The value (batch, new, heads * size) that a norm by heads reads, if heads are split and joined in the same
    way."""
    user, heads = only_user(norm.outputs[0]), norm.inputs[0]
    split = producer(_unmoved(heads), "Reshape")
    joined_alike = user is not None and (user.op_type == "Transpose") == (heads is not _unmoved(heads))
    return split.inputs[0] if split is not None and joined_alike else None


def _unmoved(value: ir.Value | None) -> ir.Value | None:
    """The input of a Transpose that swaps heads and positions; other values unchanged."""
    transpose = producer(value, "Transpose")
    swaps = transpose is not None and list(transpose.attributes.get_ints("perm", [])) == [0, 2, 1, 3]
    return transpose.inputs[0] if transpose is not None and swaps else value
