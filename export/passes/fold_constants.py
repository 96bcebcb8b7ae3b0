"""Simplify what tracing leaves behind: inline functions, fold small constants, drop duplicates.

Cases: 1. functions of the exporter are inlined; 2. nodes over constants are computed, up to the size of a vector, so
that no weight matrix is copied (`Transpose` of a weight stays a node, which later passes read through); 3. common
subexpressions are shared; 4. unused nodes go.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

# Enough for a vector of any model's width (1 + weight of some norms), far too little for a matrix.
_FOLD_ELEMENTS = 1 << 17
_MATRIX_ELEMENTS = 1 << 10


class FoldConstants(ir.passes.InPlacePass):
    """See the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = (len(model.graph), len(model.functions))
        optimizer.optimize_ir(
            model, input_size_limit=_FOLD_ELEMENTS, output_size_limit=_FOLD_ELEMENTS, should_fold=_may_fold
        )
        ir.passes.common.CommonSubexpressionEliminationPass()(model)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, (len(model.graph), len(model.functions)) != before)

    def ensures(self, model: ir.Model) -> None:
        if model.functions:
            raise ir.passes.PostconditionError(f"functions are left: {sorted(str(key) for key in model.functions)}")


def _may_fold(node: ir.Node) -> bool | None:
    """False for nodes over a matrix, whatever the optimizer thinks of its size; None leaves the choice to it."""
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return False if any(len(tensor.shape) > 1 and tensor.size > _MATRIX_ELEMENTS for tensor in constants) else None
