"""Merge linear layers with the same input, such as gate and up of an MLP, into one MatMul and a Split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight, nodes_of, only_user, replace_value
from .linear import Linear, Weight, linear_of, merge, weight_of


class MergeLinears(GraphPass):
    """Case: two or more MatMuls over the same input whose weights have no other uses, except in layers that share all
    of them: those share the merged matrix. One large product is faster than two small ones, and the input is quantized
    once. The outputs have the order of the graph.
    """

    def apply(self, model: ir.Model) -> bool:
        uses: dict[ir.Value, list[ir.Node]] = {}
        groups: dict[tuple[ir.Value, ir.Graph | None], list[Linear]] = {}
        for matmul in nodes_of(model, "MatMul"):
            weight, linear = weight_of(matmul), _linear_at(matmul)
            if weight is not None:
                uses.setdefault(weight.value, []).append(matmul)
            if linear is not None:
                # One branch of an `If` cannot read values of the other.
                groups.setdefault((linear.input, matmul.graph), []).append(linear)
        merged = [linears for linears in _owned(list(groups.values()), uses) if len(linears) > 1]
        for linears in merged:
            _merge_and_split(model, linears)
        return bool(merged)


def _linear_at(matmul: ir.Node) -> Linear | None:
    """The linear layer of a MatMul; None if it computes an output of the graph."""
    user = only_user(matmul.outputs[0])
    linear = linear_of(user.outputs[0]) if user is not None and user.op_type == "Add" else None
    if linear is None or linear.matmul is not matmul:
        linear = linear_of(matmul.outputs[0])
    return None if linear is None or linear.output.is_graph_output() else linear


def _owned(groups: Sequence[list[Linear]], uses: dict[ir.Value, list[ir.Node]]) -> list[list[Linear]]:
    """The groups without linear layers whose weight has other readers than groups of the same weights: a shared matrix
    must stay one matrix."""
    counts: dict[tuple[Weight, ...], int] = {}
    for linears in groups:
        key = tuple(linear.weight for linear in linears)
        counts[key] = counts.get(key, 0) + 1
    owned = []
    for linears in groups:
        alike = counts[tuple(linear.weight for linear in linears)]
        readers = [_readers(linear.weight, uses) for linear in linears]
        owned.append([linear for linear, count in zip(linears, readers, strict=True) if count in (1, alike)])
    return owned


def _readers(weight: Weight, uses: dict[ir.Value, list[ir.Node]]) -> int:
    """The number of nodes that read a weight, directly or through a Transpose."""
    others = [use.node for use in weight.value.uses() if use.node.op_type not in ("MatMul", "Transpose")]
    return len(uses[weight.value]) + len(others)


def _merge_and_split(model: ir.Model, linears: list[Linear]) -> None:
    anchor = linears[0].matmul
    output = merge(model, linears, anchor)
    sizes = np.array([linear.weight.shape[1] for linear in linears], np.int64)
    op = Builder(model, anchor, f"{anchor.name}.merged")
    parts = op.node("Split", [output, add_weight(model, "split.sizes", sizes)], {"axis": -1}, outputs=len(linears))
    for part, linear in zip(parts, linears, strict=True):
        replace_value(linear.output, part)
