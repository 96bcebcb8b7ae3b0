"""The embedding table becomes int8, and one matrix with the head where the source ties the two.

Cases, for Gather(table, input_ids) with a table (vocabulary, hidden):
1. a quantized head reads the same table: the head's int8 matrix (hidden, vocabulary) serves both. A token's embedding
   is a column of it times the column's scale.
2. otherwise the table is quantized by row, one scale per token.
A table that `excluded` names is left as it is. Runs after `QuantizeLinears`, whose matrix for the head it looks for.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from .graph import Builder, GraphPass, add_weight, is_weight, lazy_weight, nodes_of, replace_value
from .linear import Weight
from .quantize_linears import column_scales, quantize_columns


class QuantizeEmbedding(GraphPass):
    """See the module."""

    def __init__(self, weight_limit: int, excluded: Collection[str] = ()) -> None:
        self._limit = weight_limit
        self._excluded = frozenset(excluded)

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for gather in nodes_of(model, "Gather"):
            table = gather.inputs[0]
            if table is not None and is_weight(table, 2) and table.name not in self._excluded and _reads_tokens(gather):
                self._quantize(model, gather, table)
                modified = True
        return modified

    def _quantize(self, model: ir.Model, gather: ir.Node, table: ir.Value) -> None:
        weight = Weight(table, transposed=True)
        matrix = model.graph.initializers.get(f"{weight.name}.int8")
        op = Builder(model, gather, f"{gather.name}.int8")
        ids = gather.inputs[1]
        if matrix is not None:  # case 1: the head was quantized under this name
            scales = model.graph.initializers[f"{weight.name}.scale"]
            rows = op("Transpose", op("Gather", matrix, ids, axis=1), perm=[1, 2, 0])
        else:
            matrix, scales = _by_row(model, weight, self._limit)
            rows = op("Gather", matrix, ids, axis=0)
        last = add_weight(model, "embedding.axis", np.array([-1], np.int64))
        scale = op("Unsqueeze", op("Gather", scales, ids, axis=0), last)
        values = op("Cast", rows, to=ir.DataType.FLOAT.value)
        replace_value(gather.outputs[0], op("Mul", values, scale, like=gather.outputs[0]))


def _reads_tokens(gather: ir.Node) -> bool:
    ids = gather.inputs[1]
    return ids is not None and ids.is_graph_input() and gather.attributes.get_int("axis", 0) == 0


def _by_row(model: ir.Model, weight: Weight, limit: int) -> tuple[ir.Value, ir.Value]:
    inputs, outputs = weight.shape
    rows = lazy_weight(
        model,
        f"{weight.name}.int8",
        lambda: quantize_columns(weight.array(), limit).T,
        ir.DataType.INT8,
        (outputs, inputs),
    )
    return rows, add_weight(model, f"{weight.name}.scale", column_scales(weight.array(), limit))
