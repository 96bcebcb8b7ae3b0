"""How the simulation rounds weights: to 8 or 7 bits with a scale for each column, or to 4, 5 or 6 bits in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ...codes.nibbles import BLOCK, round_nibbles


class Grid(Protocol):
    """The values that the columns of a weight matrix may have."""

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix (inputs, outputs) as whole numbers, float32, and the scales (1, outputs) to multiply them by."""

    def columns(self, indexes: torch.Tensor) -> Grid:
        """The grid of these columns (n)."""


@dataclass(frozen=True)
class Levels:
    """Whole numbers up to `limit` in magnitude. The largest weight of a column gives its scale, and moves with it."""

    limit: int

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `column_scales` of the pass: largest magnitude / limit, or 1 if all values are 0."""
        largest = weight.abs().amax(0, keepdim=True)
        scales = torch.where(largest > 0, largest / self.limit, torch.ones_like(largest))
        return torch.round(weight / scales), scales

    def columns(self, indexes: torch.Tensor) -> Levels:
        """See `Grid`."""
        return self


@dataclass(frozen=True)
class Blocks:
    """The grid of `edgelm.export.codes.nibbles`: for each block of inputs and column a step and a zero (blocks,
    outputs), for each column a scale (1, outputs). It stays as it is while weights move."""

    bits: int
    steps: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Grid`."""
        steps, zeros = (
            part.repeat_interleave(BLOCK, 0)[: len(weight)].to(weight.device) for part in (self.steps, self.zeros)
        )
        scales = self.scales.to(weight.device)
        level = (torch.round(weight / (steps * scales)) + zeros).clamp(0, (1 << self.bits) - 1)
        return (level - zeros) * steps, scales

    def columns(self, indexes: torch.Tensor) -> Blocks:
        """See `Grid`."""
        chosen = indexes.to(self.steps.device)
        return Blocks(self.bits, self.steps[:, chosen], self.zeros[:, chosen], self.scales[:, chosen])


def fitting_blocks(weight: torch.Tensor, bits: int, limit: int = 127) -> Blocks:
    """The grid of 4, 5 or 6 bits that is nearest to a matrix (inputs, outputs). limit, cost: as of `round_nibbles`."""
    found = round_nibbles(weight.detach().cpu().numpy(), limit=limit, bits=bits)
    steps, zeros = (torch.from_numpy(part).float() for part in (found.steps, found.zeros))
    return Blocks(bits, steps, zeros, torch.from_numpy(found.scales)[None])
