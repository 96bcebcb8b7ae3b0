"""Turn MatMuls with a weight into `MatMulNBits`, and the embedding into `GatherBlockQuantized`: weights of 4 or 8 bits
in blocks, float activations."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ..codes.blocks import BlockQuantizer
from .graph import MICROSOFT, Builder, GraphPass, add_weight, is_weight, nodes_of, replace_value, use_domain
from .linear import Weight, weight_of

# `MatMulNBits`'s accuracy level on CPUs: 4 allows it to round activations to 8 bits, block by block. GPUs ignore it.
_ACCURACY_LEVEL = 4
_SUFFIX = "blocks"


class QuantizeBlocks(GraphPass):
    """Cases: 1. MatMul(x, w); 2. Gather(table, input_ids), with a table (vocabulary, hidden). A table that the head
    reads too is stored once: `GatherBlockQuantized` reads the head's blocks (vocabulary, blocks, bytes) along the last
    axis. Its zero points have another layout, so such matrices, and all tables, are symmetric. Not quantized: matrices
    in `excluded`, and products whose second factor is computed.
    """

    def __init__(self, quantizer: BlockQuantizer, excluded: Collection[str] = ()) -> None:
        self._quantizer = quantizer
        self._excluded = frozenset(excluded)

    def apply(self, model: ir.Model) -> bool:
        use_domain(model, MICROSOFT)
        gathers = [node for node in nodes_of(model, "Gather") if self._reads_table(node)]
        tables = {node.inputs[0] for node in gathers}
        stored: dict[ir.Value, list[ir.Value]] = {}
        for matmul in nodes_of(model, "MatMul"):
            weight = weight_of(matmul)
            if weight is not None and weight.name not in self._excluded:
                # A table is (vocabulary, hidden), so as a head it is transposed.
                shared = weight.value in tables and weight.transposed
                self._replace_matmul(model, matmul, weight, self._store(model, weight, shared, stored))
        for gather in gathers:
            assert gather.inputs[0] is not None
            weight = Weight(gather.inputs[0], transposed=True)
            self._replace_gather(model, gather, weight, self._store(model, weight, True, stored))
        return bool(stored)

    def _reads_table(self, gather: ir.Node) -> bool:
        table, ids = gather.inputs[0], gather.inputs[1]
        reads = ids is not None and ids.is_graph_input() and gather.attributes.get_int("axis", 0) == 0
        return reads and table is not None and is_weight(table, 2) and table.name not in self._excluded

    def _store(
        self, model: ir.Model, weight: Weight, symmetric: bool, stored: dict[ir.Value, list[ir.Value]]
    ) -> list[ir.Value]:
        """Make initializers for values, scales and, unless symmetric, zero points."""
        if weight.value not in stored:
            blocks = self._quantizer.quantized(weight.name, weight.array(), symmetric)
            parts = [
                add_weight(model, f"{weight.name}.{_SUFFIX}", blocks.values),
                add_weight(model, f"{weight.name}.scale", blocks.scales),
            ]
            if blocks.zero_points is not None:
                parts.append(add_weight(model, f"{weight.name}.zero", blocks.zero_points))
            stored[weight.value] = parts
        return stored[weight.value]

    def _middle(self, model: ir.Model, weight: Weight, scales: ir.Value) -> ir.Value:
        """Zero points in the middle of the range, one byte for each block. That is the operator's default, but GPU
        kernels used 0 (microsoft/onnxruntime#31692). With 4 bits both halves of a byte hold it, so either half may be
        read."""
        assert scales.shape is not None, "an initializer has a shape"
        middle = 0x88 if self._quantizer.settings.bits == 4 else 0x80
        return add_weight(model, f"{weight.name}.middle", np.full((*scales.shape.numpy(), 1), middle, np.uint8))

    def _replace_matmul(self, model: ir.Model, matmul: ir.Node, weight: Weight, parts: list[ir.Value]) -> None:
        settings, output = self._quantizer.settings, matmul.outputs[0]
        product = Builder(model, matmul, f"{matmul.name}.blocks")(
            "MatMulNBits",
            matmul.inputs[0],
            *parts,
            domain=MICROSOFT,
            like=output,
            K=weight.shape[0],
            N=weight.shape[1],
            bits=settings.bits,
            block_size=settings.block,
            accuracy_level=_ACCURACY_LEVEL,
        )
        replace_value(output, product)

    def _replace_gather(self, model: ir.Model, gather: ir.Node, weight: Weight, parts: list[ir.Value]) -> None:
        settings, output, hidden = self._quantizer.settings, gather.outputs[0], weight.shape[0]
        op = Builder(model, gather, f"{gather.name}.blocks")
        last = add_weight(model, "embedding.axis", np.array([-1], np.int64))
        rows = op(
            "GatherBlockQuantized",
            parts[0],
            gather.inputs[1],
            op("Unsqueeze", parts[1], last),
            self._middle(model, weight, parts[1]),
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=2,
            bits=settings.bits,
            block_size=settings.block,
        )
        flat = op("Reshape", rows, add_weight(model, "embedding.shape", np.array([0, 0, -1], np.int64)))
        if hidden % settings.block:  # the last block is padded with zeros
            begin = add_weight(model, "embedding.begin", np.array([0], np.int64))
            flat = op("Slice", flat, begin, add_weight(model, "embedding.end", np.array([hidden], np.int64)), last)
        replace_value(output, flat)
