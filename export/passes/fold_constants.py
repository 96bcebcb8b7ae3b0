"""Simplify the traced graph: inline functions, fold small constants, drop duplicates."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import (
    add_0_rule,
    cast_cast_rule,
    cast_constant_of_shape_rule,
    cast_constant_of_shape_without_value_rule,
    collapse_slice2_rule,
    collapse_slice_rule,
    div_by_1_rule,
    flatten_to_reshape_rule,
    materialize_reshape_shape_rule,
    mul_by_1_rule,
    no_op_cast_rule,
    no_op_dynamic_scatter_nd_rule,
    no_op_expand_rule,
    no_op_static_scatter_nd_rule,
    no_op_transpose_rule,
    one_reshape_matmul_reshape_rule,
    reshape_reshape_rule,
    squeeze_reshape_1d_rule,
    sub_0_rule,
    transpose_transpose_rule,
    two_reshapes_matmul_reshape_rule,
    unsqueeze_unsqueeze_rule,
)

# Enough for vectors of any model's width (1 + weight in some norms), far too little for a matrix.
_FOLD_ELEMENTS = 1 << 17
_MATRIX_ELEMENTS = 1 << 10
# Rules and folding are repeated: each may make new cases for the other.
_ROUNDS = 2
_RULES = (
    mul_by_1_rule,
    add_0_rule,
    sub_0_rule,
    div_by_1_rule,
    two_reshapes_matmul_reshape_rule,
    one_reshape_matmul_reshape_rule,
    cast_constant_of_shape_rule,
    cast_constant_of_shape_without_value_rule,
    collapse_slice_rule,
    collapse_slice2_rule,
    materialize_reshape_shape_rule,
    cast_cast_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    flatten_to_reshape_rule,
    reshape_reshape_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
    squeeze_reshape_1d_rule,
    no_op_dynamic_scatter_nd_rule,
    no_op_static_scatter_nd_rule,
)


class FoldConstants(ir.passes.InPlacePass):
    """Cases: 1. functions of the exporter are inlined; 2. nodes over constants are computed, up to the size of a
    vector, so that no weight matrix is copied (`Transpose` of a weight stays a node, which later passes read through);
    3. operators that do nothing, and chains that are one operator, are replaced by onnxscript's rules for them; 4.
    common subexpressions are shared; 5. unused nodes are removed.

    onnxscript's whole list of rules is not used. Its rule that turns two `Slice`s into a `Split` searches the whole
    graph at each node: with 30 layers it took more than half the time of all passes. Its rules for convolutions, batch
    norms and clipping are tried at each node too, and match nothing in a language model.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = (len(model.graph), len(model.functions))
        common.InlinePass()(model)
        for _ in range(_ROUNDS):
            if not _simplify(model):
                break
        for tidy in _tidying():
            tidy(model)
        return ir.passes.PassResult(model, (len(model.graph), len(model.functions)) != before)

    def ensures(self, model: ir.Model) -> None:
        if model.functions:
            raise ir.passes.PostconditionError(f"functions are left: {sorted(str(key) for key in model.functions)}")


def _simplify(model: ir.Model) -> bool:
    """Fold and rewrite once; True if anything changed."""
    folded = optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_ELEMENTS,
        output_size_limit=_FOLD_ELEMENTS,
        should_fold=_may_fold,
    )
    rewritten = rewriter.RewritePass(_RULES)(model)
    unused = common.RemoveUnusedNodesPass()(model)
    return folded.modified or rewritten.modified or unused.modified


def _tidying() -> list[ir.passes.PassBase]:
    """Constants become initializers, equal ones and equal nodes are shared, names are unique, nothing is unused."""
    return [
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.RemoveUnusedNodesPass(),
    ]


def _may_fold(node: ir.Node) -> bool | None:
    """False for nodes with a matrix as input, whatever the optimizer thinks of its size; None leaves the choice to
    it."""
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return False if any(len(tensor.shape) > 1 and tensor.size > _MATRIX_ELEMENTS for tensor in constants) else None
