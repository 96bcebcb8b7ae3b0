"""The number of rows to keep is computed on the CPU, where `Slice` wants it."""

from __future__ import annotations

import onnx_ir as ir

from .graph import Builder, GraphPass, nodes_of, replace_value
from .keep_last_logits import INPUT_NAME


class KeepOnHost(GraphPass):
    """The number of rows to keep is computed on the CPU, where `Slice` wants it.

    onnxruntime places an operator on the CPU if one of its inputs is there, such as the result of `Shape`, and the
    others are inputs of the graph or small constants. `Neg(logits_to_keep)` has no such input: it ran on the GPU, and
    each step waited for a copy of its result, which no CUDA graph can contain. So it becomes a subtraction from a 0
    that is computed from a shape. Case: Neg(logits_to_keep).
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for node in nodes_of(model, "Neg"):
            keep = node.inputs[0]
            if keep is None or keep.name != INPUT_NAME or not keep.is_graph_input():
                continue
            op = Builder(model, node, "logits.host")
            new = op("Shape", _input_ids(model), start=1, end=2)
            replace_value(node.outputs[0], op("Sub", op("Sub", new, new), keep))
            model.graph.remove(node, safe=True)
            modified = True
        return modified


def _input_ids(model: ir.Model) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == "input_ids")
