"""Give chosen products activations of 16 bits instead of 8: another function of the domain `edgelm`, with the same
inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import onnx_ir as ir

from .functions import EDGELM, PRODUCTS, WIDE, make_call
from .graph import GraphPass

_SUFFIXES = (".rows.int8", ".int8", ".int4", ".int5", ".int6")
_MATRICES = (ir.DataType.INT8, ir.DataType.UINT8)


class WidenActivations(GraphPass):
    """Case: a call of a row-wise product function whose matrix is named becomes a call of the function with the suffix
    16 (see `functions`). Names are those of the source model: the initializer is `NAME.int8`, `NAME.rows.int8` if it is
    an embedding's table too, or `NAME.int4`, `int5`, `int6`. Runs last: other passes know only rows of 8 bits.

    `matrices_of` lists the matrices and the cost of a prompt's token in each, for the choice between the two forms.
    """

    def __init__(self, names: Collection[str]) -> None:
        """names: of matrices, as in the source model."""
        self._names = frozenset(names)

    def apply(self, model: ir.Model) -> bool:
        calls = [node for node, name in _products(model) if name in self._names and not node.op_type.endswith(WIDE)]
        for node in calls:
            make_call(model, node, node.op_type + WIDE)
        return bool(calls)


def matrices_of(model: ir.Model) -> dict[str, int]:
    """{matrix of a row-wise product: multiply-adds for a token of a prompt}, in the graph's order. 0 for the matrix
    that computes logits, of which a prompt needs only one row."""
    found: dict[str, int] = {}
    for node, name in _products(model):
        logits = any(value.is_graph_output() for value in node.outputs)
        found[name] = found.get(name, 0) + (0 if logits else math.prod(_shape_of_matrix(node)))
    return found


def _products(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in list(model.graph.all_nodes()):
        if node.domain == EDGELM and node.op_type in PRODUCTS:
            name = _matrix(node).name or ""
            suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
            yield node, name.removesuffix(suffix)


def _matrix(node: ir.Node) -> ir.Value:
    return next(value for value in node.inputs if value is not None and value.dtype in _MATRICES)


def _shape_of_matrix(node: ir.Node) -> tuple[int, ...]:
    """Inputs and outputs, in either order."""
    matrix = _matrix(node)
    assert matrix.const_value is not None, "matrices are initializers"
    shape = tuple(int(size) for size in matrix.const_value.shape)  # type: ignore[arg-type]
    if matrix.dtype == ir.DataType.INT8:
        return shape
    return node.attributes.get_int("depth", 0), 16 * shape[0]
