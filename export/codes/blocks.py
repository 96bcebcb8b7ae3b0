"""Weights of 4 or 8 bits in blocks, for the operators `MatMulNBits` and `GatherBlockQuantized`.

Each column of a matrix is cut into blocks of 32, 64 or 128 inputs, each with a scale and, where it is not symmetric, a
zero point of its own. ONNX Runtime's quantizer rounds and packs; `method` says how the values are chosen:

`rtn`   each weight is rounded to the nearest value of its block (ONNX Runtime's quantizer).
`hqq`   scales and zero points are fitted to each matrix by itself (half-quadratic quantization, ONNX Runtime's).
`gptq`  later inputs compensate the errors of earlier ones, weighted by the inputs' statistics on a text.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .gptq import gptq

Method = Literal["rtn", "hqq", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "hqq", "gptq")
BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class BlockSettings:
    """How the weights are stored. bits: 4 or 8; block: inputs that share a scale."""

    bits: int
    block: int = 32
    method: Method = "rtn"


# The schemes that store weights in blocks. All of onnxruntime's kernels support blocks of 32; docs/weights.md has sizes
# and loss.
BLOCK_SCHEMES: dict[str, BlockSettings] = {"int8-weight": BlockSettings(8), "int4-weight": BlockSettings(4)}


@dataclass(frozen=True)
class Blocks:
    """A matrix (inputs, outputs) as `MatMulNBits` reads it.

    values: uint8 (outputs, blocks, block * bits / 8), two weights of 4 bits in a byte, the first in the lower half;
    scales: float32 (outputs, blocks); zero_points: uint8 (outputs, bytes of a zero point for each block), or None for
    the middle of the range.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


@dataclass
class BlockQuantizer:
    """Quantizes matrices, each once: results are kept, since one export writes several graphs.

    hessians: for `gptq`, {name of a matrix: (inputs, inputs)}, as `hessians` collects them. Matrices without one are
    rounded to the nearest. Memory: the quantized weights.
    """

    settings: BlockSettings
    hessians: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    _made: dict[tuple[str, bool], Blocks] = field(default_factory=dict)

    def quantized(self, name: str, matrix: NDArray[Any], symmetric: bool) -> Blocks:
        """The blocks of a matrix (inputs, outputs) float32. symmetric: without zero points, for a matrix that
        embedding and head share."""
        if (name, symmetric) not in self._made:
            self._made[name, symmetric] = self._quantize(name, np.ascontiguousarray(matrix, np.float32), symmetric)
        return self._made[name, symmetric]

    def _quantize(self, name: str, matrix: NDArray[np.float32], symmetric: bool) -> Blocks:
        method = self.settings.method
        if method == "hqq" and not symmetric:
            return _half_quadratic(matrix, self.settings)
        if method == "gptq" and name in self.hessians and not symmetric:
            return _by_gptq(matrix, self.hessians[name], self.settings)
        return round_to_nearest(matrix, self.settings, symmetric)


def round_to_nearest(matrix: NDArray[np.float32], settings: BlockSettings, symmetric: bool) -> Blocks:
    """Round a matrix (inputs, outputs) to the nearest values. The last block is padded with zeros."""
    with _quiet_import():
        from onnxruntime.quantization import matmul_nbits_quantizer as ort

    config = ort.DefaultWeightOnlyQuantConfig(block_size=settings.block, is_symmetric=symmetric, bits=settings.bits)
    values, scales, zero_points = ort.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return Blocks(values, scales, None if symmetric else zero_points)


def _half_quadratic(matrix: NDArray[np.float32], settings: BlockSettings) -> Blocks:
    """Scales and zero points by HQQ. Its zero points are fractions, which only slow kernels support, so they are
    rounded; then the weights are rounded to the nearest values of that grid."""
    import torch

    with _quiet_import():
        from onnxruntime.quantization import matmul_nbits_quantizer as ort

    quantizer = ort.HQQWeightOnlyQuantizer(ort.HQQWeightOnlyQuantConfig(settings.block, settings.bits))
    _, scale, zero = quantizer.quantize_internal(
        torch.from_numpy(matrix.T.copy()), bits=settings.bits, group_size=settings.block
    )
    scales, limit = scale.numpy().astype(np.float32), 2**settings.bits - 1
    zeros = np.clip(np.rint(zero.numpy()), 0, limit)
    grouped = _grouped(matrix, settings.block)
    levels = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, limit).astype(np.uint8)
    return Blocks(_packed(levels, settings.bits), scales, _packed(zeros.astype(np.uint8), settings.bits))


def _packed(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Levels packed into bytes along the last axis, the first in the lower half."""
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros((*levels.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(levels[..., ::2] | levels[..., 1::2] << 4, np.uint8)


def _by_gptq(matrix: NDArray[np.float32], hessian: NDArray[np.float32], settings: BlockSettings) -> Blocks:
    levels, scales, zeros = gptq(matrix, hessian, settings.bits, settings.block)
    grouped = _grouped(levels, settings.block)
    return Blocks(
        _packed(grouped, settings.bits),
        np.ascontiguousarray(scales.T),
        _packed(np.ascontiguousarray(zeros.T), settings.bits),
    )


def _grouped(array: NDArray[Any], block: int) -> NDArray[Any]:
    """(inputs, outputs) to (outputs, blocks, block), padded with zeros."""
    inputs, outputs = array.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), array.dtype)
    padded[:, :inputs] = array.T
    return padded.reshape(outputs, blocks, block)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Undo that onnxruntime's quantizer configures the program's logging when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
