"""int8 matrices stored with 4, 5 or 6 bits a weight, for `int4-rowwise`.

Each column of a matrix is cut into blocks of 32 inputs. A block has a step s and a zero z. A weight with the bits q is
the int8 value (q - z) * s, at most 127 in magnitude, times the column's float32 scale. z has as many bits as q, and s
has the rest of a byte, up to 15, 7 or 3: together 0.25 bits more a weight. Every sum of products is an integer, as with
8 bits, so functions, guarantees and kernels are the same.

`round_nibbles` searches for the best steps and zeros, weighted by the inputs on a text, and lets later inputs
compensate the errors of earlier ones (GPTQ).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .gptq import inverse_factor, round_chunk

BLOCK, _GROUP = 32, 16
WIDTHS = (4, 5, 6)
# Steps to try for a block, besides the one with which its range just fits: smaller ones clip single weights.
_STEPS = (1, 0, -1, -2, -3, -4)
# Columns that are rounded at once: their weights stay in the processor's cache.
_SLAB = 1024


@dataclass(frozen=True)
class Nibbles:
    """levels: uint8 (inputs, outputs), of `bits` bits; steps, zeros: uint8 (blocks, outputs); scales: float32
    (outputs); error: mean square of the products' errors, in units of the products' mean square."""

    levels: NDArray[np.uint8]
    steps: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float32]
    error: float = 0.0
    bits: int = 4

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)"""
        inputs, outputs = self.levels.shape
        return inputs, outputs

    def values(self) -> NDArray[np.int8]:
        """The int8 matrix (inputs, outputs); times the scales it is the quantized matrix."""
        zeros, steps = (
            np.repeat(of, BLOCK, axis=0)[: len(self.levels)].astype(np.int8) for of in (self.zeros, self.steps)
        )
        return np.asarray((self.levels.astype(np.int8) - zeros) * steps, np.int8)

    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The shapes of `groups` and `factors`."""
        blocks, outputs = self.steps.shape
        count = -(-outputs // _GROUP)
        return (count, blocks * self.bits, 4 * _GROUP), (count, blocks, _GROUP)

    def groups(self) -> NDArray[np.uint8]:
        """The levels in the layout that functions read (`edgelm.export.passes.narrow_functions`). Blocks are padded
        with their zero, a weight of 0."""
        filled = np.repeat(self.zeros, BLOCK, axis=0)
        filled[: len(self.levels)] = self.levels
        blocks, count = len(self.steps), self.shapes()[0][0]
        # (groups, blocks, quads of a block, columns, values of a quad)
        quads = _filled_up(filled.T, count * _GROUP).reshape(count, _GROUP, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        lines = [(quads[:, :, 0::2] & 15) | (quads[:, :, 1::2] & 15) << 4]
        places = np.arange(8, dtype=np.uint8)[:, None, None]
        lines += [
            ((quads >> bit & 1) << places).sum(axis=2, keepdims=True, dtype=np.uint8) for bit in range(4, self.bits)
        ]
        return np.ascontiguousarray(np.concatenate(lines, axis=2)).reshape(self.shapes()[0])

    def factors(self) -> NDArray[np.uint8]:
        """Steps and zeros in the layout that functions read."""
        _, (count, blocks, _) = self.shapes()
        both = np.asarray(self.steps | self.zeros << (8 - self.bits), np.uint8)
        by_column = _filled_up(both.T, count * _GROUP)
        return np.ascontiguousarray(by_column.reshape(count, _GROUP, blocks).transpose(0, 2, 1))


def nibble_bytes(inputs: int, outputs: int, bits: int) -> int:
    """Bytes of a matrix in a file, with its scales."""
    groups, blocks = -(-outputs // _GROUP), -(-inputs // BLOCK)
    return groups * blocks * _GROUP * (BLOCK * bits // 8 + 1) + 4 * outputs


def save_nibbles(nibbles: Nibbles, path: Path) -> None:
    """Write a matrix to a .npz file."""
    np.savez(path, **{field.name: getattr(nibbles, field.name) for field in fields(nibbles)})


def load_nibbles(path: Path) -> Nibbles:
    """Read what `save_nibbles` wrote."""
    with np.load(path) as file:
        return Nibbles(
            file["levels"], file["steps"], file["zeros"], file["scales"], float(file["error"]), int(file["bits"])
        )


def round_nibbles(
    matrix: NDArray[np.float32], hessian: NDArray[np.float32] | None = None, limit: int = 127, bits: int = 4
) -> Nibbles:
    """Round a matrix (inputs, outputs).

    hessian: (inputs, inputs), the mean of x xᵀ over the rows that it is multiplied with, or None: then each weight
    goes to the nearest value; limit: largest magnitude of an int8 value. Cost: inputs² * outputs multiplications with a
    hessian, some 100 * inputs * outputs operations without.

    With a hessian, blocks with the largest inputs are rounded first, and in a block the largest inputs, while all
    others can still compensate them. This leaves a tenth less error than the matrix's own order. Squared errors are
    weighted by the part that later inputs cannot compensate.
    """
    blocks = [np.arange(begin, min(begin + BLOCK, len(matrix))) for begin in range(0, len(matrix), BLOCK)]
    order = _Order(blocks, np.ones(len(matrix), np.float32), None)
    if hessian is not None:
        order = _order(blocks, hessian)
    parts = [
        _round_columns(np.asarray(matrix[:, begin : begin + _SLAB], np.float32), order, _Grid(bits, limit))
        for begin in range(0, matrix.shape[1], _SLAB)
    ]
    levels, steps, zeros = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("levels", "steps", "zeros")
    )
    rounded = Nibbles(levels, steps, zeros, np.concatenate([part.scales for part in parts]), bits=bits)
    return replace(rounded, error=_relative_error(rounded, matrix, hessian))


def _relative_error(rounded: Nibbles, matrix: NDArray[np.float32], hessian: NDArray[np.float32] | None) -> float:
    def size(values: NDArray[np.float32]) -> float:
        return float(np.vdot(values if hessian is None else hessian @ values, values))

    whole = size(matrix)
    return size(rounded.values() * rounded.scales - matrix) / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class _Grid:
    """bits: of a level; limit: largest magnitude of an int8 value."""

    bits: int
    limit: int

    @property
    def most(self) -> int:
        """The largest level; also the largest zero."""
        return (1 << self.bits) - 1

    @property
    def most_step(self) -> int:
        return (1 << (8 - self.bits)) - 1

    def steps_with(self, zero: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest steps with which no value exceeds the limit."""
        return np.asarray(np.minimum(self.most_step, self.limit // np.maximum(zero, self.most - zero)), np.float32)


@dataclass(frozen=True)
class _Order:
    """The order in which inputs are rounded. blocks: the inputs of each block; weights: for the squared errors of each
    input; factor: of GPTQ, or None. All are in the order of rounding."""

    blocks: list[NDArray[np.intp]]
    weights: NDArray[np.float32]
    factor: NDArray[np.float32] | None


def _order(blocks: list[NDArray[np.intp]], hessian: NDArray[np.float32]) -> _Order:
    sizes = np.diagonal(hessian)
    ordered = [block[np.argsort(-sizes[block], kind="stable")] for block in blocks]
    ordered.sort(key=lambda block: -float(sizes[block].sum()))
    inputs = np.concatenate(ordered)
    factor = inverse_factor(hessian[np.ix_(inputs, inputs)])
    return _Order(ordered, np.asarray(1 / np.diagonal(factor) ** 2, np.float32), factor)


def _round_columns(matrix: NDArray[np.float32], order: _Order, grid: _Grid) -> Nibbles:
    scales = _scales(matrix, grid)
    weights = matrix[np.concatenate(order.blocks)]  # a copy, in which errors are passed on
    levels = np.empty(matrix.shape, np.uint8)
    steps, zeros = (np.empty((len(order.blocks), matrix.shape[1]), np.uint8) for _ in range(2))
    begin = 0
    for inputs in order.blocks:
        end, index = begin + len(inputs), inputs.min() // BLOCK
        step, zero = _fit(weights[begin:end], order.weights[begin:end], scales, grid)

        def rounder(
            row: NDArray[np.float32], size: NDArray[np.float32] = step * scales, zero: NDArray[np.float32] = zero
        ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            level = np.clip(np.rint(row / size) + zero, 0, grid.most)
            return level, (level - zero) * size

        if order.factor is None:
            levels[inputs] = rounder(weights[begin:end])[0]
        else:
            levels[inputs] = round_chunk(weights, order.factor, begin, end, rounder)
        steps[index], zeros[index] = step, zero
        begin = end
    return Nibbles(levels, steps, zeros, scales)


def _scales(matrix: NDArray[np.float32], grid: _Grid) -> NDArray[np.float32]:
    """The finest scale for each column that fits the ranges of all its blocks; 1 for a column of zeros."""
    largest = np.zeros(matrix.shape[1], np.float32)
    for begin in range(0, len(matrix), BLOCK):
        low, high = _range(matrix[begin : begin + BLOCK])
        size = (high - low) / grid.most
        zero = np.rint(np.divide(-low, size, out=np.zeros_like(size), where=size > 0))
        largest = np.maximum(largest, size / grid.steps_with(zero))
    return np.where(largest > 0, largest, 1).astype(np.float32)


def _fit(
    block: NDArray[np.float32], weights: NDArray[np.float32], scales: NDArray[np.float32], grid: _Grid
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Step and zero of each column of a block with the least weighted error."""
    low, high = _range(block)
    fitting = np.rint((high - low) / (grid.most * scales))
    best = np.full(block.shape[1], np.inf, np.float32)
    steps, zeros = np.ones_like(best), np.zeros_like(best)
    for change in _STEPS:
        step = np.clip(fitting + change, 1, grid.most_step)
        size = step * scales
        shares = block / size
        middle = grid.most / 2 - (low + high) / (2 * size)
        for wanted in (np.floor(middle), np.ceil(middle), np.rint(-low / size)):
            zero = np.clip(wanted, 0, grid.most)
            error = np.clip(np.rint(shares), -zero, grid.most - zero) - shares
            loss = weights @ np.square(error) * size**2
            loss[step > grid.steps_with(zero)] = np.inf
            better = loss < best
            best[better], steps[better], zeros[better] = loss[better], step[better], zero[better]
    return steps, zeros


def _range(block: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest weight of each column, extended to include zero."""
    return np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)


def _filled_up(rows: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    filled = np.zeros((count, rows.shape[1]), np.uint8)
    filled[: len(rows)] = rows
    return filled
