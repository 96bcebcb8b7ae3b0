"""Move rotary position embedding into the attention operator, which reads cosines and sines from two tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.host.ort import load_onnxruntime
from .graph import ATTENTION, Builder, GraphPass, add_weight, constant, nodes_of, producer, same_shape
from .lower_positions import POSITIONS, POSITIONS_DOMAIN

_HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class _Rotation:
    """x * cos + rotate_half(x) * sin: `plain` is x flat, (batch, new, heads * size)."""

    plain: ir.Value
    heads_value: ir.Value
    cos: ir.Value
    sin: ir.Value


class RotateInAttention(GraphPass):
    """Case: query and key of a GroupQueryAttention are both x * cos + rotate_half(x) * sin over the whole head, cos and
    sin depend on nothing but the positions, and the head size is a multiple of 16 (the operator's condition). The
    tables are the model's own cos and sin, computed by running that part of the graph for every position of the
    context, so any scaling of rope that is a function of the position alone is exact.
    """

    def __init__(self, context_length: int) -> None:
        # A padding row behind the last token gets the last position: some rotations change for all positions if one is
        # beyond the context.
        self._positions = np.minimum(np.arange(context_length + 1, dtype=np.int64), context_length - 1)

    def apply(self, model: ir.Model) -> bool:
        tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
        modified = False
        for attention in nodes_of(model, ATTENTION):
            query, key = (_rotation(model, attention, index) for index in (0, 1))
            if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
                continue
            pair = (query.cos, query.sin)
            if pair not in tables:
                tables[pair] = self._tables(model, *pair)
            table = tables[pair]
            if table is not None:
                _rotate(attention, query, key, table)
                modified = True
        return modified

    def _tables(self, model: ir.Model, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Tables (positions, size / 2) float32 for cos and sin (batch, new, size). None if they depend on more than
        positions, or if their halves differ."""
        arrays = [_evaluate(model, value, self._positions) for value in (cos, sin)]
        halves: list[NDArray[np.float32]] = []
        for array in arrays:
            if array is None:
                return None
            first, second = np.split(array, 2, axis=-1)
            if not np.array_equal(first, second):
                return None
            halves.append(np.ascontiguousarray(first))
        return add_weight(model, "rotary.cos", halves[0]), add_weight(model, "rotary.sin", halves[1])


def _rotate(attention: ir.Node, query: _Rotation, key: _Rotation, tables: tuple[ir.Value, ir.Value]) -> None:
    attention.replace_input_with(0, query.plain)
    attention.replace_input_with(1, key.plain)
    if len(attention.inputs) < 9:
        attention.resize_inputs(9)
    attention.replace_input_with(7, tables[0])
    attention.replace_input_with(8, tables[1])
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _rotation(model: ir.Model, attention: ir.Node, index: int) -> _Rotation | None:
    flat = producer(attention.inputs[index], "Reshape")
    transposed = producer(flat.inputs[0], "Transpose") if flat is not None else None
    total = producer(transposed.inputs[0], "Add") if transposed is not None else None
    if flat is None or transposed is None or total is None or not _swaps_heads(transposed):
        return None
    for plain, rotated in (total.inputs, total.inputs[::-1]):
        found = _match(plain, rotated)
        if found is not None:
            heads, cos, sin = found
            size = heads.shape[-1] if heads.shape is not None else None
            if not isinstance(size, int) or size % _HEAD_MULTIPLE:
                return None
            return _Rotation(_flatten(model, attention, heads, flat), heads, cos, sin)
    return None


def _match(plain: ir.Value | None, rotated: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cos, sin) if plain = x * cos and rotated = rotate_half(x) * sin; cos and sin before their Unsqueeze."""
    first, second = producer(plain, "Mul"), producer(rotated, "Mul")
    if first is None or second is None:
        return None
    for halves, sin in (second.inputs, second.inputs[::-1]):
        heads = _half_rotated(halves)
        cos = next((value for value in first.inputs if value is not heads), None)
        if heads is None or heads not in first.inputs:
            continue
        cos_source, sin_source = producer(cos, "Unsqueeze"), producer(sin, "Unsqueeze")
        if cos_source is not None and sin_source is not None and cos_source.inputs[0] and sin_source.inputs[0]:
            return heads, cos_source.inputs[0], sin_source.inputs[0]
    return None


def _swaps_heads(transpose: ir.Node) -> bool:
    """Whether a Transpose swaps (batch, heads, new, size) and (batch, new, heads, size)."""
    return list(transpose.attributes.get_ints("perm", [])) == [0, 2, 1, 3]


def _half_rotated(value: ir.Value | None) -> ir.Value | None:
    """x if value = concat(-x[..., size/2:], x[..., :size/2])."""
    concat = producer(value, "Concat")
    negated = producer(concat.inputs[0], "Neg") if concat is not None and len(concat.inputs) == 2 else None
    if concat is None or negated is None:
        return None
    upper, lower = producer(negated.inputs[0], "Slice"), producer(concat.inputs[1], "Slice")
    source = lower.inputs[0] if lower is not None else None
    if upper is None or lower is None or source is None or upper.inputs[0] is not source or source.shape is None:
        return None
    size = source.shape[-1]
    if not isinstance(size, int) or _range(upper) != (size // 2, size) or _range(lower) != (0, size // 2):
        return None
    return source


def _range(node: ir.Node) -> tuple[int, int] | None:
    """Begin and end of a Slice along the last axis; None for other slices."""
    source = node.inputs[0]
    size = source.shape[-1] if source is not None and source.shape is not None else None
    bounds = [constant(value) for value in node.inputs[1:5]]
    if not isinstance(size, int) or len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *step = (int(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    if axis not in (-1, rank - 1) or step not in ([], [1]):
        return None
    return min(start, size), min(end, size)


def _flatten(model: ir.Model, attention: ir.Node, heads: ir.Value, flat: ir.Node) -> ir.Value:
    """(batch, heads, new, size) back to (batch, new, heads * size): the value before the heads were split, if `heads`
    is only that value reshaped and transposed; else transpose it back."""
    transpose = producer(heads, "Transpose")
    split = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    source = split.inputs[0] if split is not None else None
    output = flat.outputs[0]
    if source is not None and transpose is not None and _swaps_heads(transpose) and same_shape(source, output):
        return source
    op = Builder(model, attention, f"{attention.name}.unrotated")
    return op("Reshape", op("Transpose", heads, perm=[0, 2, 1, 3]), flat.inputs[1], like=output)


def _evaluate(model: ir.Model, value: ir.Value, positions: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Run the part of the graph that computes a value (1, positions, size) from positions.

    None if the value depends on anything but positions and weights.
    """
    nodes = _dependencies(value)
    sources = {node.outputs[0] for node in nodes if (node.op_type, node.domain) == (POSITIONS, POSITIONS_DOMAIN)}
    if len(sources) != 1:
        return None
    (source,) = sources
    if any(item in model.graph.inputs for node in nodes if node.outputs[0] is not source for item in node.inputs):
        return None
    proto = ir.to_proto(_subgraph(model, source, value))
    session = load_onnxruntime().InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"positions": positions[None]})
    return np.asarray(result[0], np.float32)


def _dependencies(value: ir.Value) -> list[ir.Node]:
    """The nodes that a value depends on, down to Positions, whose inputs are not followed."""
    seen: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen[node] = None
        if node.op_type != POSITIONS:
            waiting += [item for item in node.inputs if item is not None]
    return list(seen)


def _subgraph(model: ir.Model, source: ir.Value, value: ir.Value) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs=[source], outputs=[value])
    graph.inputs[0].name = "positions"
    graph.opset_imports.update(model.graph.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version)
