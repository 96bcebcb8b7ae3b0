"""Linear layers in a graph: a MatMul with a weight, transposed or not, with or without a bias.

Several linear layers over the same input can be merged: their weights side by side in one MatMul. This file is no pass;
`pack_attention_inputs` and `merge_linears` use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .graph import Builder, add_weight, is_weight, lazy_weight, only_user, producer

_PARTS = "edgelm_parts"  # metadata of a merged weight: its parts


@dataclass(frozen=True)
class Weight:
    """A weight matrix as MatMul's second factor: (inputs, outputs), however it is stored."""

    value: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)"""
        assert self.value.const_value is not None
        rows, columns = cast("tuple[int, int]", tuple(self.value.const_value.shape))
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def name(self) -> str:
        """The name in the source model."""
        return self.value.name or ""

    def array(self) -> NDArray[Any]:
        """The matrix (inputs, outputs): a view if the data are in memory, a copy if they are in a file, which is then
        unmapped. Otherwise all weights of a large model would be resident after one pass over them."""
        tensor = self.value.const_value
        assert tensor is not None
        array = tensor.numpy()
        if isinstance(tensor, ir.ExternalTensor):
            array = array.copy()
            tensor.release()
        return array.T if self.transposed else array


@dataclass(frozen=True)
class Linear:
    """output = input @ weight (+ bias). `output` is the value after the bias."""

    matmul: ir.Node
    input: ir.Value
    weight: Weight
    bias: ir.Value | None
    output: ir.Value


def weight_of(matmul: ir.Node) -> Weight | None:
    """The weight of a MatMul, also behind a Transpose; None if its second factor is computed."""
    value = matmul.inputs[1]
    if is_weight(value, 2):
        assert value is not None
        return Weight(value, False)
    transpose = producer(value, "Transpose")
    if transpose is not None and is_weight(transpose.inputs[0], 2) and _swaps(transpose):
        assert transpose.inputs[0] is not None
        return Weight(transpose.inputs[0], True)
    return None


def _swaps(transpose: ir.Node) -> bool:
    return list(transpose.attributes.get_ints("perm", [1, 0])) == [1, 0]


def linear_of(value: ir.Value | None) -> Linear | None:
    """The linear layer that computes a value, or None."""
    add = producer(value, "Add")
    if add is not None:
        bias = next((item for item in add.inputs if is_weight(item, 1)), None)
        matmul = producer(next((item for item in add.inputs if item is not bias), None), "MatMul")
        if bias is None or matmul is None or only_user(matmul.outputs[0]) is not add:
            return None
    else:
        bias, matmul = None, producer(value, "MatMul")
    weight = weight_of(matmul) if matmul is not None else None
    if matmul is None or weight is None or matmul.inputs[0] is None:
        return None
    assert value is not None
    return Linear(matmul, matmul.inputs[0], weight, bias, value)


def merge(model: ir.Model, linears: Sequence[Linear], anchor: ir.Node) -> ir.Value:
    """Replace several linear layers over the same input by one with the outputs side by side on the last axis.

    anchor: the node to insert it in front of; the input must be computed there. If only some layers have a bias, the
    others get zeros. The merged weight is computed when the file is written. Layers that share their weights share the
    merged one too.
    """
    weights = [linear.weight for linear in linears]
    inputs, widths = weights[0].shape[0], [weight.shape[1] for weight in weights]
    name = "+".join(
        [
            weights[0].name,
            *(weight.name.split(".")[-2] if "." in weight.name else weight.name for weight in weights[1:]),
        ]
    )
    merged = next((item for item in model.graph.initializers.values() if item.meta.get(_PARTS) == weights), None)
    if merged is None:
        merged = lazy_weight(
            model,
            name,
            lambda: np.concatenate([weight.array() for weight in weights], axis=1),
            ir.DataType.FLOAT,
            (inputs, sum(widths)),
        )
        merged.meta[_PARTS] = weights
    op = Builder(model, anchor, name)
    output = op("MatMul", linears[0].input, merged)
    output.type = linears[0].output.type
    if linears[0].input.shape is not None:
        output.shape = ir.Shape([*linears[0].input.shape[:-1], sum(widths)])
    if any(linear.bias is not None for linear in linears):
        biases = [_bias(linear) for linear in linears]
        output = op("Add", output, add_weight(model, f"{name}.bias", np.concatenate(biases)), like=output)
    return output


def _bias(linear: Linear) -> NDArray[Any]:
    if linear.bias is None or linear.bias.const_value is None:
        return np.zeros(linear.weight.shape[1], np.float32)
    return np.broadcast_to(linear.bias.const_value.numpy(), (linear.weight.shape[1],))
