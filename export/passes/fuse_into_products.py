"""What stands in front of a row-wise product goes into its call, where a kernel computes both in one pass over a row.

Cases, for a call of `edgelm::RowwiseMatMul` that alone reads what it multiplies:
1. SkipSimplifiedLayerNormalization(x, skip, w), a residual sum and its norm -> NormedRowwiseMatMul, which gives the sum
   too
2. gate * Sigmoid(gate) * up, over the halves gate and up of a value, in this order -> GatedRowwiseMatMul
Runs after `QuantizeEmbedding`, which looks for the product of the head. Everything else in front of a product stays, as
do gates with other activations.
"""

from __future__ import annotations

import onnx_ir as ir

from .functions import EDGELM, GATED_ROWWISE_MATMUL, NORMED_ROWWISE_MATMUL, ROWWISE_MATMUL, call, define
from .graph import MICROSOFT, Builder, GraphPass, nodes_of, only_user, producer, replace_value


class FuseIntoProducts(GraphPass):
    """See the module."""

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for product in nodes_of(model, ROWWISE_MATMUL, EDGELM):
            source = product.inputs[0]
            if source is not None and only_user(source) is product:
                modified |= _fuse_norm(model, product, source) or _fuse_gate(model, product, source)
        return modified


def _fuse_norm(model: ir.Model, product: ir.Node, source: ir.Value) -> bool:
    norm = producer(source, "SkipSimplifiedLayerNormalization")
    if norm is None or norm.domain != MICROSOFT or source is not norm.outputs[0] or len(norm.inputs) != 3:
        return False
    define(model, NORMED_ROWWISE_MATMUL)
    # Where the norm stands: what reads the sum may stand in front of the product.
    y, total = Builder(model, norm, f"{product.name}.normed").node(
        NORMED_ROWWISE_MATMUL,
        [*norm.inputs, *product.inputs[1:]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=EDGELM,
        outputs=2,
        like=product.outputs[0],
    )
    replace_value(product.outputs[0], y)
    for old in norm.outputs[3:]:
        replace_value(old, total)
    return True


def _fuse_gate(model: ir.Model, product: ir.Node, source: ir.Value) -> bool:
    gated, weight = producer(source, "Mul"), product.inputs[1]
    if gated is None or weight is None or weight.shape is None:
        return False
    for silu, up in (gated.inputs, gated.inputs[::-1]):
        gate = _gate_of(silu)
        split = producer(gate, "Split")
        if gate is None or split is None or list(split.outputs) != [gate, up] or not _halves(split, weight.shape[0]):
            continue
        op = Builder(model, product, f"{product.name}.gated")
        y = call(model, op, GATED_ROWWISE_MATMUL, split.inputs[0], weight, *product.inputs[2:], like=product.outputs[0])
        replace_value(product.outputs[0], y)
        return True
    return False


def _gate_of(value: ir.Value | None) -> ir.Value | None:
    """x where value = x * Sigmoid(x)."""
    silu = producer(value, "Mul")
    for gate, opening in (silu.inputs, silu.inputs[::-1]) if silu is not None else ():
        sigmoid = producer(opening, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is gate:
            return gate
    return None


def _halves(split: ir.Node, size: int | ir.SymbolicDim) -> bool:
    """Whether the outputs of a Split are `size` values each of its input's last axis."""
    shapes = [value.shape for value in split.outputs]
    axis = split.attributes.get_int("axis", 0)
    return all(shape is not None and shape[-1] == size and axis in (-1, len(shape) - 1) for shape in shapes)
