"""Simulation of the row-wise schemes in torch: a module's products as the bundle's graph computes them, with gradients.

It applies the float32 operations of `passes/quantize_linears.py`, `passes/widen_activations.py` and
`passes/quantize_embedding.py` in the same order. A product equals onnxruntime's bit for bit if the weights are rounded
to nearest (ties to even).

Simulated are products with a two-dimensional parameter (`linear`, `addmm`, `matmul`) and rows of the input embedding,
but neither the KV cache nor stacked matrices of experts. Gradients ignore the rounding (straight-through estimator) and
use the rounded weights and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ...codes.nibbles import WIDTHS
from .grids import Grid, Levels, fitting_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LIMIT, _TINY = 127, 1e-30
_LEVELS = Levels(_LIMIT)
# Steps of the low plane per step of the high plane.
_LOW_STEPS = 256
# A sum of this many products of two int8 values is exact in float32, in any order of additions.
_EXACT = 1024


class Quantized(TorchFunctionMode):
    """Context manager in which products with a module's weights are computed as in the quantized bundle.

    It intercepts torch functions rather than layer classes, so it covers every call with the module's own parameters.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        weight_bits: int = 8,
        activation_bits: int = 16,
        origin: PreTrainedModel | None = None,
    ) -> None:
        """weight_bits: 8 or 7, or 4 to 6 in blocks; activation_bits: 8 or 16, for all products; origin: the module
        whose weights the blocks fit, with the same names (None: this module, as it is when it runs). Cost of 4 to 6
        bits: at the first run some 100 operations for each weight."""
        super().__init__()
        self._bits, self._planes = weight_bits, activation_bits // 8
        self._levels = Levels((1 << (weight_bits - 1)) - 1)
        fitted = dict((origin or module).named_parameters())
        self._fitted = {id(weight): fitted[name] for name, weight in module.named_parameters() if weight.dim() == 2}
        self._grids: dict[int, Grid] = {}
        table = getattr(module.get_input_embeddings(), "weight", None)
        self._table = id(table)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """torch's hook."""
        if func in _LINEAR and id(args[1]) in self._fitted:
            return self._linear(*args, **(kwargs or {}))
        if func in _EMBEDDING and self._table in map(id, args[:2]):
            ids = args[1] if id(args[0]) == self._table else args[0]
            grid = self._grid(self._table, transposed=True).columns(ids.flatten())
            return round_rows(func(*args, **(kwargs or {})), grid)
        if func in _MATMUL and id(args[1]) in self._fitted:
            return product(args[0], args[1], self._grid(id(args[1])), self._planes)
        if func is torch.addmm and id(args[2]) in self._fitted and not kwargs:
            return product(args[1], args[2], self._grid(id(args[2])), self._planes) + args[0]
        return func(*args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = product(x, weight.t(), self._grid(id(weight), transposed=True), self._planes)
        return result if bias is None else result + bias

    def _grid(self, weight: int, *, transposed: bool = False) -> Grid:
        """The grid of the columns of a weight, by its id; transposed: of its rows."""
        if self._bits not in WIDTHS:
            return self._levels
        if weight not in self._grids:
            fitted = self._fitted[weight]
            self._grids[weight] = fitting_blocks(fitted.t() if transposed else fitted, self._bits)
        return self._grids[weight]


_LINEAR = {torch.nn.functional.linear}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_EMBEDDING = {torch.nn.functional.embedding, torch.embedding}


def product(x: torch.Tensor, weight: torch.Tensor, grid: Grid = _LEVELS, planes: int = 1) -> torch.Tensor:
    """x (..., inputs) float32 @ weight (inputs, outputs) float32 as in the bundle, (..., outputs) float32.

    grid: of the weight's columns; planes: of x, 1 for 8 bits, 2 for 16.
    """
    result: torch.Tensor = _Product.apply(x, weight, grid, planes)  # type: ignore[no-untyped-call]
    return result


def round_rows(rows: torch.Tensor, grid: Grid = _LEVELS) -> torch.Tensor:
    """Rows of an embedding table (..., hidden) float32, rounded as in the bundle's table. Each row has a grid of its
    own, so only the rows that were looked up are needed. grid: of these rows, as columns."""
    matrix, scales = grid.nearest(rows.detach().flatten(0, -2).t())
    return rows + ((matrix * scales).t().reshape(rows.shape) - rows.detach())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, grid: Grid, planes: int) -> torch.Tensor:
        row = x.abs().amax(-1, keepdim=True).clamp_min(_TINY)
        step = torch.tensor(1 / _LIMIT, dtype=torch.float32, device=x.device)
        share = x / row
        # The graph's uint8 values minus their zero point 128.
        values = torch.round(share / step).clamp(-128, 127)
        matrix, scale = grid.nearest(weight)
        result = _exact(values, matrix) * (step * scale)
        if planes == 2:
            low = torch.round((share - values * step) / (step / _LOW_STEPS)).clamp(-128, 127)
            result = result + _exact(low, matrix) * (step * scale) * (1 / _LOW_STEPS)
            values = values + low / _LOW_STEPS
        ctx.save_for_backward(values, row * step, matrix, scale)
        return result * row

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        values, rows, matrix, scale = ctx.saved_tensors
        for_x = gradient @ (matrix * scale).t()
        for_weight = (values * rows).flatten(0, -2).t() @ gradient.flatten(0, -2)
        return for_x, for_weight, None, None


def _exact(values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Product of integer matrices, rounded to float32 once, as onnxruntime rounds its int32 result."""
    if matrix.shape[0] <= _EXACT:
        return values @ matrix
    parts = zip(torch.split(values, _EXACT, -1), torch.split(matrix, _EXACT, 0), strict=True)
    total = sum((a @ b).double() for a, b in parts)
    assert isinstance(total, torch.Tensor), "a matrix has rows"
    return total.float()
