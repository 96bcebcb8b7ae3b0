"""Quantize the embedding table to int8, as one matrix with the head if the source ties them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .functions import EDGELM, ROWWISE_MATMUL_TRANSPOSED, make_call
from .graph import Builder, GraphPass, add_weight, is_weight, lazy_weight, nodes_of, replace_value
from .linear import Weight
from .quantize_linears import column_scales, int8_matrix


class QuantizeEmbedding(GraphPass):
    """Cases, for Gather(table, input_ids) with a float table (vocabulary, hidden), which is quantized by row, one scale
    per token:
    1. a quantized head reads the same table: its int8 matrix (hidden, vocabulary) is the same one, turned: a call of
       `edgelm::RowwiseMatMulTransposed`, or a Transpose in the scheme that calls no functions. onnxruntime turns it
       once, at load, into its kernel's order; of the table in the file only the tokens' rows are ever read. (Reading
       columns of the head's matrix instead would touch every page: the matrix would be in memory twice.)
    2. otherwise nothing else reads it.
    Tables in `excluded` are not changed. Runs after `QuantizeLinears`, since it searches for the head's int8 matrix.
    """

    def __init__(
        self, weight_limit: int, excluded: Collection[str] = (), rounded: Mapping[str, Path] | None = None
    ) -> None:
        """As of `QuantizeLinears`."""
        self._limit = weight_limit
        self._excluded = frozenset(excluded)
        self._rounded = rounded or {}

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for gather, weight in _embeddings(model):
            if weight.name not in self._excluded:
                self._quantize(model, gather, weight)
                modified = True
        return modified

    def _quantize(self, model: ir.Model, gather: ir.Node, weight: Weight) -> None:
        head = model.graph.initializers.get(f"{weight.name}.int8")
        op = Builder(model, gather, f"{gather.name}.int8")
        ids = gather.inputs[1]
        if head is not None:  # case 1: the head was quantized under this name
            matrix, scales = (
                _rows(model, weight, self._limit, self._rounded),
                model.graph.initializers[f"{weight.name}.scale"],
            )
            _turn(model, op, head, matrix)
        else:
            matrix = _rows(model, weight, self._limit, self._rounded)
            scales = add_weight(model, f"{weight.name}.scale", column_scales(weight.array(), self._limit))
        rows = op("Gather", matrix, ids, axis=0)
        last = add_weight(model, "embedding.axis", np.array([-1], np.int64))
        scale = op("Unsqueeze", op("Gather", scales, ids, axis=0), last)
        values = op("Cast", rows, to=ir.DataType.FLOAT.value)
        replace_value(gather.outputs[0], op("Mul", values, scale, like=gather.outputs[0]))


def tables_of(model: ir.Model) -> list[Weight]:
    """The embedding tables that this pass quantizes, as (hidden, vocabulary)."""
    return [weight for _, weight in _embeddings(model)]


def _embeddings(model: ir.Model) -> Iterator[tuple[ir.Node, Weight]]:
    for gather in nodes_of(model, "Gather"):
        table = gather.inputs[0]
        if table is not None and is_weight(table, 2) and table.dtype == ir.DataType.FLOAT and _reads_tokens(gather):
            yield gather, Weight(table, transposed=True)


def _reads_tokens(gather: ir.Node) -> bool:
    ids = gather.inputs[1]
    return ids is not None and ids.is_graph_input() and gather.attributes.get_int("axis", 0) == 0


def _turn(model: ir.Model, op: Builder, head: ir.Value, matrix: ir.Value) -> None:
    """Let the readers of the head's matrix (hidden, vocabulary) read the table's (vocabulary, hidden)."""
    for use in list(head.uses()):
        if use.node.domain == EDGELM:
            use.node.replace_input_with(use.idx, matrix)
            make_call(model, use.node, ROWWISE_MATMUL_TRANSPOSED)
    if head.uses():
        replace_value(head, op("Transpose", matrix, perm=[1, 0]))


def _rows(model: ir.Model, weight: Weight, limit: int, rounded: Mapping[str, Path]) -> ir.Value:
    """The int8 table (vocabulary, hidden)."""
    inputs, outputs = weight.shape
    return lazy_weight(
        model,
        f"{weight.name}.rows.int8",
        lambda: int8_matrix(weight, limit, rounded).T,
        ir.DataType.INT8,
        (outputs, inputs),
    )
