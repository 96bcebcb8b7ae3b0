"""Fuse a residual sum and the norm behind it into one node with both outputs."""

from __future__ import annotations

import onnx_ir as ir

from .graph import MICROSOFT, Builder, GraphPass, nodes_of, producer, replace_value, same_shape, use_domain

_FUSED = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


class FuseResidualNorms(GraphPass):
    """Cases, where a and b have the same shape (batch, new, hidden) and the norm is over the last axis:
    1. SimplifiedLayerNormalization(a + b, w)       -> SkipSimplifiedLayerNormalization
    2. LayerNormalization(a + b, w, bias)           -> SkipLayerNormalization
    A sum that feeds several norms is fused with the first of them. Sums that broadcast are left alone.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for op_type, fused in _FUSED.items():
            for norm in nodes_of(model, op_type):
                modified |= _fuse(model, norm, fused)
        return modified


def _fuse(model: ir.Model, norm: ir.Node, fused: str) -> bool:
    total = producer(norm.inputs[0], "Add")
    axis = norm.attributes.get_int("axis", -1)
    if total is None or not same_shape(*total.inputs) or len(total.outputs[0].shape or ()) != 3 or axis not in (-1, 2):
        return False
    if len(norm.outputs) > 1 and any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        return False
    if any(weight is None or weight.const_value is None for weight in norm.inputs[1:]):
        return False  # a computed weight may be behind the sum, where the fused node cannot read it
    use_domain(model, MICROSOFT)
    inputs = [*total.inputs, *norm.inputs[1:]]
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    outputs = Builder(model, total, norm.name or "norm").node(
        fused, inputs, {"epsilon": epsilon}, domain=MICROSOFT, outputs=4, like=norm.outputs[0]
    )
    # The unnamed outputs are the mean and the inverse deviation, which inference does not need.
    outputs[1].name = outputs[2].name = ""
    replace_value(norm.outputs[0], outputs[0])
    replace_value(total.outputs[0], outputs[3])
    return True
