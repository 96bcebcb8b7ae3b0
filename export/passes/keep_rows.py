"""Cut off the rows that `keep_last_logits` drops earlier: in front of what the last layer computes row by row."""

from __future__ import annotations

import onnx_ir as ir

from .functions import EDGELM, PRODUCTS
from .graph import Builder, GraphPass, producer, replace_value
from .keep_last_logits import INPUT_NAME

_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


class KeepRows(GraphPass):
    """Case: the Slice of `logits_to_keep` moves in front of products (`edgelm::RowwiseMatMul` and its variants) and
    norms whose results only it needs. It stops at values that others need whole: the last attention's result and the
    residual sum. Integer products and norms give a row the same bits whatever other rows are computed; float products
    do not, and stay. Runs after `FuseIntoProducts`, which leaves little else in between.
    """

    def apply(self, model: ir.Model) -> bool:
        cut = next((node for node in model.graph if keeps_last(node)), None)
        if cut is None or cut.inputs[0] is None:
            return False
        between = _only_for(model, cut)
        needed = {value: node for node in reversed(between) for value in _computed(node, between)}
        if not any(node.domain == EDGELM for node in between) or not all(_has_rows(value) for value in needed):
            return False
        count = next(value for value in model.graph.inputs if value.name == INPUT_NAME)
        start = Builder(model, next(iter(model.graph)), f"{cut.name}.start")("Neg", count)
        for value, user in needed.items():
            kept = Builder(model, user, f"{value.name}.kept")("Slice", value, start, *cut.inputs[2:], like=value)
            kept.shape = _cut_shape(value, cut)
            for node in between:
                for index, source in enumerate(node.inputs):
                    if source is value:
                        node.replace_input_with(index, kept)
        for node in between:
            for value in node.outputs:
                value.shape = _cut_shape(value, cut)
        replace_value(cut.outputs[0], cut.inputs[0])
        return True


def keeps_last(node: ir.Node) -> bool:
    """Whether a node is the Slice by `logits_to_keep`."""
    if node.op_type != "Slice":
        return False
    start = producer(node.inputs[1], "Neg")
    return start is not None and start.inputs[0] is not None and start.inputs[0].name == INPUT_NAME


def _only_for(model: ir.Model, cut: ir.Node) -> list[ir.Node]:
    """The products and norms, in order, whose results only the cut and each other need."""
    found: list[ir.Node] = []
    for node in reversed(model.graph):
        kind = (node.domain == EDGELM and node.op_type in PRODUCTS) or node.op_type in _NORMS
        users = [use.node for value in node.outputs for use in value.uses()]
        alone = all(user is cut or user in found for user in users)
        if kind and users and alone and not any(value.is_graph_output() for value in node.outputs):
            found.insert(0, node)
    return found


def _computed(node: ir.Node, between: list[ir.Node]) -> list[ir.Value]:
    """The inputs of a node that are neither constant nor computed by the others."""
    values = [value for value in node.inputs if value is not None and value.const_value is None]
    return [value for value in values if value.producer() not in between]


def _has_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3


def _cut_shape(value: ir.Value, cut: ir.Node) -> ir.Shape | None:
    kept = cut.outputs[0].shape
    return None if value.shape is None or kept is None else ir.Shape([value.shape[0], kept[1], *value.shape[2:]])
