"""Activations become float16, and with them the weights that are not quantized and the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .graph import ATTENTION, Builder, GraphPass, lazy_weight

_EMBEDDINGS = ("Gather", "GatherBlockQuantized")
_CACHE = ("past_key_values.", "present.")
# Operators that stay float32.
_WIDE = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Exp", "Range")
_CACHE_SCALES = (12, 13)
_LARGEST = float(np.finfo(np.float16).max)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class ToFloat16(GraphPass):
    """Activations become float16, and with them the weights that are not quantized and the KV cache.

    Values that depend on the text (on the embedding of `input_ids`, or on the cache) become float16. Values that depend
    only on positions stay float32, since positions above 2,048 are not exact in float16, and are cast where the two
    meet. Operators that square or sum over many elements also stay float32, since their results exceed float16's range.
    The logits are cast back to float32.

    The norms and the attention operator compute in float32 inside. Scales of an INT8 cache stay float32.
    """

    def apply(self, model: ir.Model) -> bool:
        half = _half_values(model)
        weights: dict[ir.Value, ir.Value] = {}
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        logits = model.graph.outputs[0]
        for node in list(model.graph):
            if node.outputs and any(value in half for value in node.outputs):
                _narrow(model, node, half, weights, casts)
            else:
                _widen(model, node, half, casts)
        for value in half:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(HALF)
        if logits in half:
            _cast_output(model, logits)
        return bool(half)

    def ensures(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name is not None and value.name.startswith(_CACHE) and value.dtype != HALF:
                raise ir.passes.PostconditionError(f"{value.name} is still {value.dtype}")


def _half_values(model: ir.Model) -> set[ir.Value]:
    """The values that become float16: the cache, and what is computed from it and from the embeddings."""
    found = {value for value in model.graph.inputs if value.dtype == FLOAT}
    for node in model.graph:
        embeds = node.op_type in _EMBEDDINGS and any(
            value is not None and value.is_graph_input() and value.name == "input_ids" for value in node.inputs
        )
        if (embeds or any(value in found for value in node.inputs)) and node.op_type not in _WIDE:
            found.update(value for value in node.outputs if value.dtype in (FLOAT, None) and _floats(node))
    return found | _half_constants(model, found)


def _half_constants(model: ir.Model, half: set[ir.Value]) -> set[ir.Value]:
    """Values that depend only on weights, such as a transposed matrix, if all their readers are float16."""
    constant: set[ir.Value] = set()
    for node in model.graph:
        if all(value is None or value.const_value is not None or value in constant for value in node.inputs):
            constant.update(node.outputs)
    found: set[ir.Value] = set()
    for node in reversed(model.graph):
        users = [use.node for value in node.outputs for use in value.uses()]
        if node.outputs[0] in constant and all(_is_half(user, half | found) for user in users):
            found.update(value for value in node.outputs if value.dtype in (FLOAT, None) and _floats(node))
    return found


def _is_half(node: ir.Node, half: set[ir.Value]) -> bool:
    return any(value in half for value in node.outputs)


def _floats(node: ir.Node) -> bool:
    """Whether the outputs of a node have the type of its inputs, unless they have a type already."""
    return node.op_type not in ("Shape", "Size", "ArgMax", "Equal", "Less", "Greater", "NonZero", "IsNaN")


def _narrow(
    model: ir.Model,
    node: ir.Node,
    half: set[ir.Value],
    weights: dict[ir.Value, ir.Value],
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> None:
    """Make a node float16: cast its float32 inputs."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT.value:
        node.attributes["to"] = ir.AttrInt64("to", HALF.value)
        return
    for index, value in _float_inputs(node, half):
        if node.op_type == ATTENTION and index in _CACHE_SCALES:
            continue
        if value.const_value is not None:
            if value not in weights:
                weights[value] = _half_weight(model, value)
            node.replace_input_with(index, weights[value])
        else:
            node.replace_input_with(index, _cast(model, node, value, HALF, casts))


def _widen(
    model: ir.Model, node: ir.Node, half: set[ir.Value], casts: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> None:
    """Keep a node as it is: cast its float16 inputs back, unless it only reads their shape."""
    if node.op_type in ("Shape", "Size", "Cast"):
        return
    for index, value in enumerate(node.inputs):
        if value is not None and value in half:
            node.replace_input_with(index, _cast(model, node, value, FLOAT, casts))


def _float_inputs(node: ir.Node, half: set[ir.Value]) -> Iterator[tuple[int, ir.Value]]:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == FLOAT and value not in half:
            yield index, value


def _half_weight(model: ir.Model, value: ir.Value) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None

    def narrowed() -> NDArray[np.float16]:
        # Masks contain the lowest float32, which would become an infinity.
        return np.asarray(np.clip(tensor.numpy(), -_LARGEST, _LARGEST), np.float16)

    return lazy_weight(model, f"{value.name}.half", narrowed, HALF, cast("tuple[int, ...]", tuple(tensor.shape)))


def _cast(
    model: ir.Model,
    anchor: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    """The value in another type, cast once, in front of its first reader."""
    if (value, dtype) not in casts:
        made = Builder(model, anchor, f"{value.name}.{dtype.name.lower()}")("Cast", value, to=dtype.value)
        made.type, made.shape = ir.TensorType(dtype), value.shape
        casts[value, dtype] = made
    return casts[value, dtype]


def _cast_output(model: ir.Model, logits: ir.Value) -> None:
    last = logits.producer()
    assert last is not None and logits.name is not None, "logits are computed"
    name, logits.name = logits.name, f"{logits.name}.half"
    node = ir.node("Cast", [logits], {"to": FLOAT.value})
    (wide,) = node.outputs
    wide.name, wide.type, wide.shape = name, ir.TensorType(FLOAT), logits.shape
    node.name = f"{name}.cast"
    model.graph.insert_after(last, node)
    model.graph.outputs[0] = wide
