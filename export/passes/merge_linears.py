"""Linear layers that read the same value become one MatMul and a Split: gate and up of an MLP, and their like.

Case: two or more MatMuls over the same input, with weights that nobody else uses. One large product is faster than
two small ones, and the input is quantized once. The outputs' order is the order in the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight, nodes_of, only_user, replace_value
from .linear import Linear, Weight, linear_of, merge


class MergeLinears(GraphPass):
    """See the module."""

    def apply(self, model: ir.Model) -> bool:
        groups: dict[ir.Value, list[Linear]] = {}
        for matmul in nodes_of(model, "MatMul"):
            linear = _mergeable(matmul)
            if linear is not None:
                groups.setdefault(linear.input, []).append(linear)
        for linears in groups.values():
            if len(linears) > 1:
                _merge_and_split(model, linears)
        return any(len(linears) > 1 for linears in groups.values())


def _mergeable(matmul: ir.Node) -> Linear | None:
    user = only_user(matmul.outputs[0])
    linear = linear_of(user.outputs[0]) if user is not None and user.op_type == "Add" else None
    if linear is None or linear.matmul is not matmul:
        linear = linear_of(matmul.outputs[0])
    if linear is None or linear.output.is_graph_output() or not _owned(linear.weight):
        return None
    return linear


def _owned(weight: Weight) -> bool:
    """Whether one MatMul alone reads a weight: a shared matrix must stay one matrix."""
    reader = only_user(weight.value)
    return reader is not None and (not weight.transposed or only_user(reader.outputs[0]) is not None)


def _merge_and_split(model: ir.Model, linears: list[Linear]) -> None:
    anchor = linears[0].matmul
    output = merge(model, linears, anchor)
    sizes = np.array([linear.weight.shape[1] for linear in linears], np.int64)
    op = Builder(model, anchor, f"{anchor.name}.merged")
    parts = op.node("Split", [output, add_weight(model, "split.sizes", sizes)], {"axis": -1}, outputs=len(linears))
    for part, linear in zip(parts, linears, strict=True):
        replace_value(linear.output, part)
