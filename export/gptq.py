"""GPTQ (Frantar et al., arXiv 2210.17323): the error of each rounded weight is made good by those of later inputs.

onnxruntime's own function of this name (1.31.1) gives what rounding gives: it reads the empty triangle of the factored
Hessian, so that no error is handed on. This one also keeps the grid that it rounds to, which onnxruntime's looks for
again in the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Added to the Hessian's diagonal, in units of its mean: inputs that always go together would make it singular.
_DAMPING = 0.01


def gptq(
    matrix: NDArray[np.float32], hessian: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round a matrix (inputs, outputs), input by input.

    hessian: (inputs, inputs), the mean of x xᵀ over the rows that it is multiplied with. Returns: levels uint8 (inputs,
    outputs), scales float32 and zero points uint8 (blocks, outputs): a weight is (level - zero point) * scale. Cost:
    inputs² * outputs multiplications.
    """
    inputs, limit = len(matrix), 2**bits - 1
    weights = matrix.astype(np.float32, copy=True)
    factor = _factor(hessian)
    levels = np.zeros(matrix.shape, np.uint8)
    scales, zeros = [], []
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        scale, zero = _grid(weights[begin:end], limit)
        errors = np.zeros((end - begin, matrix.shape[1]), np.float32)
        for index in range(begin, end):
            row = weights[index]
            chosen = np.clip(np.rint(row / scale) + zero, 0, limit)
            levels[index] = chosen
            errors[index - begin] = (row - (chosen - zero) * scale) / factor[index, index]
            weights[index + 1 : end] -= factor[index, index + 1 : end, None] * errors[index - begin]
        weights[end:] -= factor[begin:end, end:].T @ errors
        scales.append(scale)
        zeros.append(zero)
    return levels, np.stack(scales), np.stack(zeros).astype(np.uint8)


def _factor(hessian: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangular U with Uᵀ U the inverse of the damped Hessian."""
    damped = hessian.astype(np.float64)
    diagonal = np.arange(len(damped))
    # An input that is always zero has no say in anything.
    damped[diagonal, diagonal] += np.where(damped[diagonal, diagonal] > 0, 0, 1)
    damped[diagonal, diagonal] += _DAMPING * damped[diagonal, diagonal].mean()
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def _grid(weights: NDArray[np.float32], limit: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point for each output of a block (inputs, outputs), so that the range and zero are in it."""
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    scale = np.where(high > low, (high - low) / limit, 1).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, limit)
