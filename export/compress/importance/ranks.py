"""How much each head and channel matters to what the model says.

By Taylor expansion: the change of the loss, to first order, if a unit were silent, |sum of activation times gradient|,
averaged over the tokens of a text (Michel et al., arXiv 1905.10650, for heads; Molchanov et al., arXiv 1906.10771).
By magnitude: the norm of a unit's weights, in units of the mean over all heads, or all channels, of the model, since
the two kinds of matrices are not of one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..module.linears import matrix_of, own
from ..module.units import Block, outer_inputs
from .curvature import without_weight_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def magnitudes(module: PreTrainedModel, blocks: list[Block]) -> list[torch.Tensor]:
    """Importance of the units of each block, (count) float32."""
    squares = [_squares(module, block) for block in blocks]
    costs = [block.parameters(module) for block in blocks]
    # Norms are compared for each weight: a head has many more than a channel.
    sizes = [(square / cost).sqrt() for square, cost in zip(squares, costs, strict=True)]
    scores = []
    for block, size, cost in zip(blocks, sizes, costs, strict=True):
        kin = torch.cat([other for item, other in zip(blocks, sizes, strict=True) if item.kind == block.kind])
        scores.append(size / kin.mean() * cost)
    return scores


def taylor(module: PreTrainedModel, blocks: list[Block], texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Importance of the units of each block, (count) float32. texts: windows (1, tokens). Cost: each forward and back;
    gradients of activations only, none of weights."""
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
    """The sum of the squared weights of each unit."""
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
