"""Turn linear layers that were traced as `Gemm` into MatMul and Add, the only form that later passes know."""

from __future__ import annotations

import onnx_ir as ir

from .graph import Builder, GraphPass, is_weight, nodes_of, only_user, producer, replace_value


class NormalizeLinears(GraphPass):
    """Cases, for Gemm(x, W, bias) with alpha = beta = 1, x not transposed, W and bias weights:
    1. x is a (batch, new, inputs) value reshaped to two axes, and the result is reshaped back: both Reshapes are
    removed
    2. otherwise MatMul and Add on two axes
    A transposed W gets a Transpose, which no pass folds.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for gemm in nodes_of(model, "Gemm"):
            modified |= _normalize(model, gemm)
        return modified


def _normalize(model: ir.Model, gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    plain = attributes.get_float("alpha", 1.0) == 1.0 and attributes.get_float("beta", 1.0) == 1.0
    if not plain or attributes.get_int("transA", 0) == 1 or not is_weight(gemm.inputs[1], 2):
        return False
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is not None and not is_weight(bias, 1):
        return False
    op = Builder(model, gemm, gemm.name or "linear")
    weight = gemm.inputs[1]
    if attributes.get_int("transB", 0) == 1:
        weight = op("Transpose", weight, perm=[1, 0])
    source, output = _ends(gemm)
    result = op("MatMul", source, weight, like=output)
    if bias is not None:
        result = op("Add", result, bias, like=output)
    replace_value(output, result)
    return True


def _ends(gemm: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """Input and output of the linear layer: outside of the two Reshapes in case 1, else the Gemm's own."""
    output = gemm.outputs[0]
    before, after = producer(gemm.inputs[0], "Reshape"), only_user(output)
    if before is None or after is None or after.op_type != "Reshape":
        return gemm.inputs[0], output
    source, result = before.inputs[0], after.outputs[0]
    if source is None or source.shape is None or result.shape is None or gemm.inputs[0] is None:
        return gemm.inputs[0], output
    flat = gemm.inputs[0].shape
    same_width = flat is not None and len(source.shape) == 3 and source.shape[-1] == flat[-1]
    known = all(isinstance(size, int) or size.value is not None for size in source.shape)
    if same_width and known and list(source.shape[:-1]) == list(result.shape[:-1]) and len(result.shape) == 3:
        return source, result
    return gemm.inputs[0], output
