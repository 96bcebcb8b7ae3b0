"""Remove additions of zeros, which come from sublayers that were left out."""

from __future__ import annotations

import onnx_ir as ir

from .graph import GraphPass, constant, nodes_of, producer, replace_value, same_shape

# Larger than any model's width. Matrices are not read to find out that they are not zero.
_MOST_ELEMENTS = 1 << 17


class DropZeros(GraphPass):
    """Cases: 1. Add of a value and zeros, if the sum has the value's shape, is replaced by the value; 2. the zeros may
    be behind Expand or ConstantOfShape, as torch traces them.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for addition in nodes_of(model, "Add"):
            for kept, other in (addition.inputs, addition.inputs[::-1]):
                if kept is not None and _is_zero(other) and same_shape(kept, addition.outputs[0]):
                    replace_value(addition.outputs[0], kept)
                    modified = True
                    break
        return modified


def _is_zero(value: ir.Value | None) -> bool:
    """Whether a value is known to be all zeros."""
    expand = producer(value, "Expand")
    if expand is not None:
        return _is_zero(expand.inputs[0])
    filled = producer(value, "ConstantOfShape")
    if filled is not None:
        given = filled.attributes.get("value")
        return given is None or not given.as_tensor().numpy().any()
    if value is None or value.const_value is None or value.const_value.size > _MOST_ELEMENTS:
        return False
    array = constant(value)
    return array is not None and not array.any()
