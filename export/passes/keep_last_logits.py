"""Compute logits only for the last `logits_to_keep` tokens of each row; 0 means all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight, producer

INPUT_NAME = "logits_to_keep"
_ROW_WISE = ("Mul", "Div", "Add", "Sub", "Tanh", "Cast", "Identity")


class KeepLastLogits(GraphPass):
    """Compute logits only for the last `logits_to_keep` tokens of each row; 0 means all.

    A new input `logits_to_keep` int64 (1) cuts the head's input to its last rows. Case: the MatMul with a weight
    nearest to the output `logits` (operators behind it, such as a soft cap or a scale, work row by row).
    """

    def apply(self, model: ir.Model) -> bool:
        head = _head(model)
        if head is None or head.inputs[0] is None:
            return False
        keep = ir.Value(name=INPUT_NAME, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        model.graph.inputs.append(keep)
        axis = add_weight(model, "logits.axis", np.array([1], np.int64))
        end = add_weight(model, "logits.end", np.array([np.iinfo(np.int64).max], np.int64))
        op = Builder(model, head, "logits")
        hidden = head.inputs[0]
        kept = op("Slice", hidden, op("Neg", keep), end, axis)
        kept.type = hidden.type
        if hidden.shape is not None:
            kept.shape = ir.Shape([hidden.shape[0], ir.SymbolicDim("kept"), *hidden.shape[2:]])
        head.replace_input_with(0, kept)
        logits = model.graph.outputs[0]
        logits.shape = ir.Shape([ir.SymbolicDim("batch"), ir.SymbolicDim("kept"), *(logits.shape or (None,))[-1:]])
        return True

    def ensures(self, model: ir.Model) -> None:
        if INPUT_NAME not in [value.name for value in model.graph.inputs]:
            raise ir.passes.PostconditionError("no MatMul with a weight leads to the logits")


def _head(model: ir.Model) -> ir.Node | None:
    value: ir.Value | None = model.graph.outputs[0]
    while (node := producer(value)) is not None:
        if node.op_type == "MatMul":
            return node
        if node.op_type not in _ROW_WISE:
            return None
        computed = [item for item in node.inputs if item is not None and item.const_value is None]
        if len(computed) != 1:
            return None
        value = computed[0]
    return None
