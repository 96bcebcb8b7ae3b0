"""Remove Reshapes that undo each other, such as heads that are split and joined again around attention."""

from __future__ import annotations

import onnx_ir as ir

from .graph import GraphPass, nodes_of, producer, replace_value, same_shape


class DropReshapes(GraphPass):
    """Case: a Reshape whose result has the shape of a value further up in a chain of Reshapes is replaced by that
    value."""

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for reshape in nodes_of(model, "Reshape"):
            source = _same_further_up(reshape)
            if source is not None:
                replace_value(reshape.outputs[0], source)
                modified = True
        return modified


def _same_further_up(reshape: ir.Node) -> ir.Value | None:
    step: ir.Node | None = reshape
    while step is not None:
        source = step.inputs[0]
        if source is not None and same_shape(source, reshape.outputs[0]) and not source.is_graph_input():
            return source
        step = producer(source, "Reshape")
    return None
