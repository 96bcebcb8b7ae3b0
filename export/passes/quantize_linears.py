"""Turn MatMuls with a weight into integer products: int8 weights, activations quantized at run time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .functions import ROWWISE_MATMUL, call
from .graph import MICROSOFT, Builder, GraphPass, add_weight, lazy_weight, nodes_of, replace_value, use_domain
from .linear import Weight, weight_of

ROWWISE_SCHEMES = ("int8-rowwise", "int4-rowwise")
TENSOR = "int8-tensor"

# Takes a MatMul, the int8 matrix and its scales; returns the product.
_Product = Callable[[ir.Model, ir.Node, ir.Value, ir.Value], ir.Value]


class QuantizeLinears(GraphPass):
    """Weights: symmetric, one scale per output column, scale = max|column| / limit, limit 127 for 8 bits, 63 for 7.
    Values are rounded to the nearest, unless `rounded` has a file with the matrix
    (`edgelm.export.quantization.rounding`). Activations, by scheme:

    - `int8-rowwise`, and `int4-rowwise`, of whose matrices `narrow_weights` then writes some in 4 bits: each row x (one
      token) by itself: r = max|x|, q = round(x / r * 127) + 128 as uint8. The product is then multiplied by r. A
      token's result depends on no other token, so a text may be cut anywhere. This is a call of the function
      `edgelm::RowwiseMatMul` (see `functions`), which `widen_activations` may change to the one with 16 bits.
    - `int8-tensor`: ONNX Runtime's classic dynamic quantization: one scale and zero point for all rows of a step
      together, with its own operators `DynamicQuantizeLinear` and `MatMulIntegerToFloat`.

    An activation that feeds several MatMuls is quantized once: by onnxruntime if it computes the functions' bodies,
    else by this pass. Not quantized: matrices in `excluded`, and products whose second factor is computed.
    """

    def __init__(
        self,
        scheme: str,
        weight_limit: int,
        excluded: Collection[str] = (),
        rounded: Mapping[str, Path] | None = None,
    ) -> None:
        """weight_limit: largest magnitude of a weight, 127 or 63; excluded: names of matrices to leave as they are;
        rounded: as of `int8_matrix`."""
        products: dict[str, Callable[[], _Product]] = {
            **dict.fromkeys(ROWWISE_SCHEMES, lambda: _by_row),
            TENSOR: _ByTensor,
        }
        self._products = products[scheme]
        self._limit = weight_limit
        self._excluded = frozenset(excluded)
        self._rounded = rounded or {}

    def apply(self, model: ir.Model) -> bool:
        use_domain(model, MICROSOFT)
        product = self._products()
        matrices: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for matmul in nodes_of(model, "MatMul"):
            weight = weight_of(matmul)
            if weight is None or weight.name in self._excluded:
                continue
            if weight.value not in matrices:
                matrices[weight.value] = quantized_weight(model, weight, self._limit, self._rounded)
            replace_value(matmul.outputs[0], product(model, matmul, *matrices[weight.value]))
        return bool(matrices)


def column_scales(array: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    """One scale per column of a matrix (rows, columns): its largest magnitude / limit, or 1 for a column of zeros."""
    largest = np.maximum(array.max(axis=0), -array.min(axis=0))
    return np.where(largest > 0, largest / limit, 1).astype(np.float32)


def quantize_columns(array: NDArray[np.float32], limit: int) -> NDArray[np.int8]:
    """The int8 matrix (rows, columns); times `column_scales` it approximates the array."""
    return np.asarray(np.rint(array / column_scales(array, limit)), np.int8)


def int8_matrix(weight: Weight, limit: int, rounded: Mapping[str, Path]) -> NDArray[np.int8]:
    """The int8 matrix (inputs, outputs) of a weight.

    rounded: {name: .npy file of int8 (inputs, outputs) in units of `column_scales`}. Other matrices are rounded to the
    nearest.
    """
    if weight.name in rounded:
        return np.asarray(np.load(rounded[weight.name], mmap_mode="r"))
    return quantize_columns(weight.array(), limit)


def quantized_weight(
    model: ir.Model, weight: Weight, limit: int, rounded: Mapping[str, Path]
) -> tuple[ir.Value, ir.Value]:
    """Initializers of a weight's int8 matrix (inputs, outputs) and its scales (outputs). The matrix is computed when
    the file is written, the scales now. rounded: as of `int8_matrix`."""
    matrix = lazy_weight(
        model, f"{weight.name}.int8", lambda: int8_matrix(weight, limit, rounded), ir.DataType.INT8, weight.shape
    )
    return matrix, add_weight(model, f"{weight.name}.scale", column_scales(weight.array(), limit))


def _by_row(model: ir.Model, matmul: ir.Node, matrix: ir.Value, scales: ir.Value) -> ir.Value:
    op = Builder(model, matmul, f"{matmul.name}.int8")
    return call(model, op, ROWWISE_MATMUL, matmul.inputs[0], matrix, scales, like=matmul.outputs[0])


class _ByTensor:
    """int8-tensor: remembers the activations that it quantized."""

    def __init__(self) -> None:
        self._activations: dict[tuple[ir.Value | None, ir.Graph | None], list[ir.Value]] = {}

    def __call__(self, model: ir.Model, matmul: ir.Node, matrix: ir.Value, scales: ir.Value) -> ir.Value:
        source, output = matmul.inputs[0], matmul.outputs[0]
        key = source, matmul.graph  # branches of an `If` cannot read each other's values
        if key not in self._activations:
            op = Builder(model, matmul, f"{matmul.name}.input")
            self._activations[key] = op.node("DynamicQuantizeLinear", [source], outputs=3)
        values, scale, zero_point = self._activations[key]
        op = Builder(model, matmul, f"{matmul.name}.int8")
        inputs = (values, matrix, scale, scales, zero_point)
        return op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT, like=output)
