"""Move norms and gates in front of a row-wise product into its call, where a kernel computes both in one pass over a
row."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from .functions import (
    EDGELM,
    GATED_ROWWISE_MATMUL,
    GELU_GATED_ROWWISE_MATMUL,
    NORMED_ROWWISE_MATMUL,
    POST_NORMED_ROWWISE_MATMUL,
    ROWWISE_MATMUL,
    WIDE,
    define,
)
from .graph import MICROSOFT, Builder, GraphPass, nodes_of, only_user, producer, replace_value


class FuseIntoProducts(GraphPass):
    """Cases, for a call of `edgelm::RowwiseMatMul`, of 8 or 16 bits, that is the only reader of its input:
    1. SkipSimplifiedLayerNormalization(x, skip, w), a residual sum and its norm -> NormedRowwiseMatMul, which gives the
       sum too
    2. the same where SimplifiedLayerNormalization(y, v), a norm behind a layer that nothing else reads, is x or skip,
       with the same epsilon -> PostNormedRowwiseMatMul
    3. gate * Sigmoid(gate) * up, over the halves gate and up of a value, in this order -> GatedRowwiseMatMul
    4. Gelu(gate) * up, exact or by tanh, over the same -> GeluGatedRowwiseMatMul
    Runs after `QuantizeEmbedding`, which searches for the product of the head. Anything else in front of a product
    stays, as do gates with other activations.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for bits in ("", WIDE):
            for product in nodes_of(model, ROWWISE_MATMUL + bits, EDGELM):
                source = product.inputs[0]
                if source is not None and only_user(source) is product:
                    modified |= _fuse_norm(model, product, source, bits) or _fuse_gate(model, product, source, bits)
        return modified


def _fuse_norm(model: ir.Model, product: ir.Node, source: ir.Value, bits: str) -> bool:
    norm = producer(source, "SkipSimplifiedLayerNormalization")
    if norm is None or norm.domain != MICROSOFT or source is not norm.outputs[0] or len(norm.inputs) != 3:
        return False
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    name, inputs = NORMED_ROWWISE_MATMUL + bits, list(norm.inputs)
    for x, skip in (norm.inputs[:2], norm.inputs[1::-1]):
        post = _post_norm(skip, epsilon)
        if post is not None:
            name, inputs = POST_NORMED_ROWWISE_MATMUL + bits, [x, *post.inputs, norm.inputs[2]]
            break
    define(model, name)
    # At the place of the norm: readers of the sum may be in front of the product.
    y, total = Builder(model, norm, f"{product.name}.normed").node(
        name,
        [*inputs, *product.inputs[1:]],
        {"epsilon": epsilon},
        domain=EDGELM,
        outputs=2,
        like=product.outputs[0],
    )
    replace_value(product.outputs[0], y)
    for old in norm.outputs[3:]:
        replace_value(old, total)
    return True


def _post_norm(value: ir.Value | None, epsilon: float) -> ir.Node | None:
    """The norm over the last axis that computes a value, if it has one reader and this epsilon."""
    norm = producer(value, "SimplifiedLayerNormalization")
    if norm is None or value is None or only_user(value) is None or value is not norm.outputs[0]:
        return None
    shape, axis = value.shape, norm.attributes.get_int("axis", -1)
    last = axis == -1 or (shape is not None and axis == len(shape) - 1)
    constant = norm.inputs[1] is not None and norm.inputs[1].const_value is not None
    return norm if last and constant and norm.attributes.get_float("epsilon", 1e-5) == epsilon else None


class _Opening(NamedTuple):
    """The activation of a gate: its input, and the function with its attributes."""

    gate: ir.Value
    function: str
    attributes: dict[str, str]


def _fuse_gate(model: ir.Model, product: ir.Node, source: ir.Value, bits: str) -> bool:
    gated, weight = producer(source, "Mul"), product.inputs[1]
    if gated is None or weight is None or weight.shape is None:
        return False
    for activated, up in (gated.inputs, gated.inputs[::-1]):
        opening = _silu(activated) or _gelu(activated)
        split = producer(opening.gate, "Split") if opening is not None else None
        if opening is None or split is None or list(split.outputs) != [opening.gate, up]:
            continue
        if not _halves(split, weight.shape[0]):
            continue
        name = opening.function + bits
        define(model, name)
        op = Builder(model, product, f"{product.name}.gated")
        inputs = [split.inputs[0], *product.inputs[1:]]
        (y,) = op.node(name, inputs, opening.attributes, domain=EDGELM, like=product.outputs[0])
        replace_value(product.outputs[0], y)
        return True
    return False


def _silu(value: ir.Value | None) -> _Opening | None:
    """The gate, if value = x * Sigmoid(x)."""
    silu = producer(value, "Mul")
    for gate, opening in (silu.inputs, silu.inputs[::-1]) if silu is not None else ():
        sigmoid = producer(opening, "Sigmoid")
        if gate is not None and sigmoid is not None and sigmoid.inputs[0] is gate:
            return _Opening(gate, GATED_ROWWISE_MATMUL, {})
    return None


def _gelu(value: ir.Value | None) -> _Opening | None:
    """The gate, if value = Gelu(x), ONNX's operator."""
    gelu = producer(value, "Gelu")
    if gelu is None or gelu.domain or gelu.inputs[0] is None:
        return None
    approximate = gelu.attributes.get_string("approximate", "none")
    return _Opening(gelu.inputs[0], GELU_GATED_ROWWISE_MATMUL, {"approximate": approximate})


def _halves(split: ir.Node, size: int | ir.SymbolicDim) -> bool:
    """Whether the outputs of a Split are `size` values each of its input's last axis."""
    shapes = [value.shape for value in split.outputs]
    axis = split.attributes.get_int("axis", 0)
    return all(shape is not None and shape[-1] == size and axis in (-1, len(shape) - 1) for shape in shapes)
