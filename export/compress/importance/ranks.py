"""Importance of heads and channels by Taylor expansion or by magnitude.

Taylor: first-order change of the loss if a unit's activation were 0, |sum of activation times gradient|, summed over
the tokens of a text (Michel et al., arXiv 1905.10650, for heads; Molchanov et al., arXiv 1906.10771).
Magnitude: norm of a unit's weights, relative to the mean over all heads, or all channels, of the model, because their
matrices differ in scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...module.linears import matrix_of, own
from ...module.units import Block, outer_inputs
from .moments import without_weight_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def magnitudes(module: PreTrainedModel, blocks: list[Block]) -> list[torch.Tensor]:
    """Importance of the units of each block, (count) float32."""
    squares = [_squares(module, block) for block in blocks]
    costs = [block.parameters(module) for block in blocks]
    # The norm is taken per weight: a head has many more weights than a channel.
    sizes = [(square / cost).sqrt() for square, cost in zip(squares, costs, strict=True)]
    scores = []
    for block, size, cost in zip(blocks, sizes, costs, strict=True):
        kin = torch.cat([other for item, other in zip(blocks, sizes, strict=True) if item.kind == block.kind])
        scores.append(size / kin.mean() * cost)
    return scores


def taylor(module: PreTrainedModel, blocks: list[Block], texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Importance of the units of each block, (count) float32. texts: windows (1, tokens) int64. Cost: a forward and
    backward pass per window, with gradients of activations only."""
    scores = [torch.zeros(block.count) for block in blocks]
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int, values: torch.Tensor) -> None:
        values.retain_grad()
        seen[number] = values

    with without_weight_gradients(module), outer_inputs(module, blocks, keep):
        for ids in texts:
            module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for number, values in seen.items():
                assert values.grad is not None, "retained above"
                effect = (values.detach() * values.grad).reshape(-1, blocks[number].count, blocks[number].width)
                scores[number] += effect.sum(-1).abs().sum(0)
            seen.clear()
    return scores


def _squares(module: PreTrainedModel, block: Block) -> torch.Tensor:
    """Sum of the squared weights of each unit, (count) float32."""
    outer = matrix_of(own(module, block.outer))
    total = outer.square().sum(0).reshape(block.count, block.width).sum(1)
    for name, layout in block.inner.items():
        squares = matrix_of(own(module, name)).square().sum(1)
        begin = 0
        for width in layout:
            end = begin + width * block.count
            total = total + squares[begin:end].reshape(block.count, width).sum(1)
            begin = end
    return total
