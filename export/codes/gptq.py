"""GPTQ (Frantar et al., arXiv 2210.17323): later inputs compensate the error of each rounded weight.

Two grids: blocks of inputs with a scale and a zero point each (`gptq`, for 4 and 8 bits), and one scale for a whole
column (`gptq_columns`, for int8-rowwise). onnxruntime's function of this name (1.31.1) only rounds: it reads the empty
triangle of the factored Hessian, so no error is passed on. This one also returns its grid, which onnxruntime's fits
again to the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Damping, added to the Hessian's diagonal in units of its mean: correlated inputs would make it singular.
_DAMPING = 0.01
# Inputs whose errors are passed on together, as one matrix product.
_CHUNK = 256
# Columns that are rounded at once. They are independent; their weights stay in the processor's cache.
_SLAB = 2048

# Takes a row of weights (outputs); returns its levels and their values.
_Rounder = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def gptq(
    matrix: NDArray[np.float32], hessian: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round a matrix (inputs, outputs) to blocks of inputs.

    hessian: (inputs, inputs), the mean of x xᵀ over the rows that it is multiplied with. Returns: levels uint8 (inputs,
    outputs), scales float32 and zero points uint8 (blocks, outputs): a weight is (level - zero point) * scale. Cost:
    inputs² * outputs multiplications.
    """
    inputs, limit = len(matrix), 2**bits - 1
    weights = matrix.astype(np.float32, copy=True)
    factor = inverse_factor(hessian)
    levels = np.zeros(matrix.shape, np.uint8)
    scales, zeros = [], []
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        scale, zero = _grid(weights[begin:end], limit)

        def rounder(
            row: NDArray[np.float32], scale: NDArray[np.float32] = scale, zero: NDArray[np.float32] = zero
        ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            level = np.clip(np.rint(row / scale) + zero, 0, limit)
            return level, (level - zero) * scale

        levels[begin:end] = round_chunk(weights, factor, begin, end, rounder)
        scales.append(scale)
        zeros.append(zero)
    return levels, np.stack(scales), np.stack(zeros).astype(np.uint8)


def gptq_columns(
    matrix: NDArray[np.float32], hessian: NDArray[np.float32], scales: NDArray[np.float32], limit: int
) -> NDArray[np.int8]:
    """Round a matrix (inputs, outputs) to multiples of `scales` (outputs), at most `limit` in magnitude.

    hessian: as of `gptq`. Inputs with the largest mean square are rounded first, while all others can still compensate
    them. Cost: inputs² * outputs multiplications.
    """
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    factor = inverse_factor(hessian[np.ix_(order, order)])
    levels = np.empty(matrix.shape, np.int8)
    for begin in range(0, matrix.shape[1], _SLAB):
        columns = slice(begin, begin + _SLAB)
        levels[order, columns] = _round_columns(matrix[order, columns], factor, scales[columns], limit)
    return levels


def _round_columns(
    matrix: NDArray[np.float32], factor: NDArray[np.float32], scales: NDArray[np.float32], limit: int
) -> NDArray[np.int8]:
    weights = matrix.astype(np.float32, copy=True)
    levels = np.empty(matrix.shape, np.int8)

    def rounder(row: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        level = np.clip(np.rint(row / scales), -limit, limit)
        return level, level * scales

    for begin in range(0, len(matrix), _CHUNK):
        end = min(begin + _CHUNK, len(matrix))
        levels[begin:end] = round_chunk(weights, factor, begin, end, rounder)
    return levels


def round_chunk(
    weights: NDArray[np.float32], factor: NDArray[np.float32], begin: int, end: int, rounder: _Rounder
) -> NDArray[np.float32]:
    """Levels of the rows from begin to end - 1. Their errors are passed on to all later rows of `weights`, in place."""
    levels = np.empty((end - begin, weights.shape[1]), np.float32)
    errors = np.empty_like(levels)

    def pass_on(first: int, middle: int, last: int) -> None:
        """The errors of the rows from first to middle - 1, to those from middle to last - 1."""
        weights[middle:last] -= factor[first:middle, middle:last].T @ errors[first - begin : middle - begin]

    def round_rows(first: int, last: int) -> None:
        # By halves: most errors are then passed on by matrix products, and few row by row.
        if last - first == 1:
            levels[first - begin], value = rounder(weights[first])
            errors[first - begin] = (weights[first] - value) / factor[first, first]
        else:
            middle = (first + last) // 2
            round_rows(first, middle)
            pass_on(first, middle, last)
            round_rows(middle, last)

    round_rows(begin, end)
    pass_on(begin, end, len(weights))
    return levels


def inverse_factor(hessian: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangular U with Uᵀ U the inverse of the damped Hessian.

    With both axes reversed, Cholesky's lower factor of the Hessian is an upper R with R Rᵀ = H, and U is R's inverse: a
    third of the work of inverting H first.
    """
    import torch

    damped = hessian.astype(np.float64)
    diagonal = np.arange(len(damped))
    # An input that is always zero has no influence.
    damped[diagonal, diagonal] += np.where(damped[diagonal, diagonal] > 0, 0, 1)
    damped[diagonal, diagonal] += _DAMPING * damped[diagonal, diagonal].mean()
    turned = torch.from_numpy(np.ascontiguousarray(damped[::-1, ::-1]))
    upper = torch.linalg.cholesky(turned).flip(0, 1)
    identity = torch.eye(len(damped), dtype=torch.float64)
    return np.asarray(torch.linalg.solve_triangular(upper, identity, upper=True).numpy(), np.float32)


def _grid(weights: NDArray[np.float32], limit: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point for each output of a block (inputs, outputs). The grid includes the range and zero."""
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    scale = np.where(high > low, (high - low) / limit, 1).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, limit)
