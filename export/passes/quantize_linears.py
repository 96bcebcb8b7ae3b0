"""MatMuls with a weight become integer products: int8 weights, activations quantized while the model runs.

Weights: symmetric, one scale per output column, scale = max|column| / limit, limit 127 for 8 bits, 63 for 7.
Activations, by scheme:

`int8-rowwise`  each row x (one token) by itself: r = max|x|, q = round(x / r * 127) + 128 as uint8. The product is
                multiplied by r afterwards. A token's result depends on no other token, so a text may be cut anywhere.
`int8-tensor`   ONNX Runtime's classic dynamic quantization: one scale and zero point for all rows of a step together.

An activation that feeds several MatMuls is quantized once. Only ONNX Runtime's own operators are used
(`QuantizeLinear`, `DynamicQuantizeLinear`, `MatMulIntegerToFloat`).
Not quantized: matrices that `excluded` names, and products whose second factor is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .graph import MICROSOFT, Builder, GraphPass, add_weight, lazy_weight, nodes_of, replace_value, use_domain
from .linear import Weight, weight_of

ROWWISE = "int8-rowwise"
TENSOR = "int8-tensor"
_ACTIVATION_LIMIT = 127
_ZERO_POINT = 128


@dataclass(frozen=True)
class _Quantized:
    """A quantized activation: uint8 values, scale, zero point, and for each row what its product is multiplied by."""

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    row_factor: ir.Value | None


class QuantizeLinears(GraphPass):
    """See the module."""

    def __init__(self, scheme: str, weight_limit: int, excluded: Collection[str] = ()) -> None:
        """weight_limit: largest magnitude of a weight, 127 or 63; excluded: names of matrices to leave as they are."""
        self._quantize = {ROWWISE: _by_row, TENSOR: _by_tensor}[scheme]
        self._limit = weight_limit
        self._excluded = frozenset(excluded)

    def apply(self, model: ir.Model) -> bool:
        use_domain(model, MICROSOFT)
        activations: dict[ir.Value, _Quantized] = {}
        matrices: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for matmul in nodes_of(model, "MatMul"):
            weight, source = weight_of(matmul), matmul.inputs[0]
            if weight is None or source is None or weight.name in self._excluded:
                continue
            if source not in activations:
                activations[source] = self._quantize(model, source, Builder(model, matmul, f"{matmul.name}.input"))
            if weight.value not in matrices:
                matrices[weight.value] = quantized_weight(model, weight, self._limit)
            _replace(model, matmul, activations[source], *matrices[weight.value])
        return bool(activations)


def column_scales(array: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    """One scale per column of a matrix (rows, columns): its largest magnitude / limit, or 1 for a column of zeros."""
    largest = np.maximum(array.max(axis=0), -array.min(axis=0))
    return np.where(largest > 0, largest / limit, 1).astype(np.float32)


def quantize_columns(array: NDArray[np.float32], limit: int) -> NDArray[np.int8]:
    """int8 matrix (rows, columns), which times `column_scales` is about the array."""
    return np.asarray(np.rint(array / column_scales(array, limit)), np.int8)


def quantized_weight(model: ir.Model, weight: Weight, limit: int) -> tuple[ir.Value, ir.Value]:
    """Initializers of a weight's int8 matrix (inputs, outputs) and its scales (outputs). The matrix is computed when
    the file is written, the scales now."""
    matrix = lazy_weight(
        model, f"{weight.name}.int8", lambda: quantize_columns(weight.array(), limit), ir.DataType.INT8, weight.shape
    )
    return matrix, add_weight(model, f"{weight.name}.scale", column_scales(weight.array(), limit))


def _replace(model: ir.Model, matmul: ir.Node, activation: _Quantized, matrix: ir.Value, scales: ir.Value) -> None:
    op = Builder(model, matmul, f"{matmul.name}.int8")
    output = matmul.outputs[0]
    product = op(
        "MatMulIntegerToFloat",
        activation.values,
        matrix,
        activation.scale,
        scales,
        activation.zero_point,
        domain=MICROSOFT,
        like=output,
    )
    if activation.row_factor is not None:
        product = op("Mul", product, activation.row_factor, like=output)
    replace_value(output, product)


def _by_row(model: ir.Model, source: ir.Value, op: Builder) -> _Quantized:
    axis = _shared(model, "rowwise.axis", lambda: np.array([-1], np.int64))
    scale = _shared(model, "rowwise.scale", lambda: np.array(1 / _ACTIVATION_LIMIT, np.float32))
    zero_point = _shared(model, "rowwise.zero_point", lambda: np.array(_ZERO_POINT, np.uint8))
    # A row of zeros divides by zero. Whatever uint8 its NaN become, the product is finite, and times 0 it is 0: a guard
    # would be one more operator for each matrix, 3 % of a decode step of the reference model.
    largest = op("ReduceMax", op("Abs", source, like=source), axis, keepdims=1)
    values = op("QuantizeLinear", op("Div", source, largest, like=source), scale, zero_point)
    return _Quantized(values, scale, zero_point, largest)


def _by_tensor(model: ir.Model, source: ir.Value, op: Builder) -> _Quantized:
    values, scale, zero_point = op.node("DynamicQuantizeLinear", [source], outputs=3)
    return _Quantized(values, scale, zero_point, None)


def _shared(model: ir.Model, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """An initializer that all nodes share."""
    return model.graph.initializers.get(name) or add_weight(model, name, make())
