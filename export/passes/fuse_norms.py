"""Root mean square norms: six nodes become one `SimplifiedLayerNormalization`."""

from __future__ import annotations

import onnx_ir as ir

from .graph import Builder, GraphPass, constant, nodes_of, only_user, producer, replace_value, scalar


class FuseRMSNorm(GraphPass):
    """Cases, with x of any rank, w a vector and e a number:
    1. w * (x * (1 / sqrt(mean(x ^ 2, -1) + e)))   (Llama and most others)
    2. the same with x * x for the square
    3. the same with x / sqrt(...)
    The arithmetic is matched, not the class name: if a norm multiplies by 1 + weight, that sum is its w.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for mean in nodes_of(model, "ReduceMean"):
            modified |= _fuse(model, mean)
        return modified


def _fuse(model: ir.Model, mean: ir.Node) -> bool:
    source = _squared(mean.inputs[0])
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if source is None or source.shape is None or axes is None or mean.attributes.get_int("keepdims", 1) != 1:
        return False
    if axes.tolist() not in ([-1], [len(source.shape) - 1]):
        return False
    add = only_user(mean.outputs[0])
    epsilon = _other_scalar(add, mean.outputs[0])
    root = only_user(add.outputs[0]) if add is not None else None
    if epsilon is None or root is None or root.op_type != "Sqrt":
        return False
    normed = _normalized(source, root.outputs[0])
    scaled = only_user(normed) if normed is not None else None
    if normed is None or scaled is None or scaled.op_type != "Mul":
        return False
    weight = next(value for value in scaled.inputs if value is not normed)
    if weight is None or weight.shape is None or list(weight.shape) != [source.shape[-1]]:
        return False
    fused = Builder(model, scaled, scaled.name or "norm")(
        "SimplifiedLayerNormalization", source, weight, like=scaled.outputs[0], axis=-1, epsilon=epsilon, stash_type=1
    )
    replace_value(scaled.outputs[0], fused)
    return True


def _squared(value: ir.Value | None) -> ir.Value | None:
    power = producer(value, "Pow")
    if power is not None and scalar(power.inputs[1]) == 2.0:
        return power.inputs[0]
    product = producer(value, "Mul")
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _other_scalar(add: ir.Node | None, known: ir.Value) -> float | None:
    if add is None or add.op_type != "Add":
        return None
    return scalar(next((value for value in add.inputs if value is not known), None))


def _normalized(source: ir.Value, root: ir.Value) -> ir.Value | None:
    """x divided by the root, in either form."""
    user = only_user(root)
    if user is not None and user.op_type == "Div" and user.inputs[0] is source:
        return user.outputs[0]
    if user is None or user.op_type != "Reciprocal":
        return None
    product = only_user(user.outputs[0])
    return product.outputs[0] if product is not None and product.op_type == "Mul" and source in product.inputs else None
