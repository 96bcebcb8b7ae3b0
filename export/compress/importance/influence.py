"""Block influence: how much a layer, or its attention, changes the hidden state.

It is 1 minus the cosine similarity of the hidden states before and after, averaged over the tokens of a text (Men et
al., ShortGPT, arXiv 2403.03853). Parts with low influence are candidates for removal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...module.structure import attention_sublayers, decoder_layers, observed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOW, _WINDOWS = 256, 8
# Models copy names and phrases from far back. Windows of 256 tokens do not show what that needs.
_LONG_WINDOW = 512
# Tokens of a text used for second moments. More change little and take more passes.
MOST_TOKENS = 1 << 14


def windows(token_ids: Sequence[int], context_length: int) -> list[torch.Tensor]:
    """Up to 8 evenly spread windows of a text, each (1, up to 256) int64."""
    size = min(_WINDOW, context_length, len(token_ids))
    room = len(token_ids) - size
    count = min(_WINDOWS, 1 + room // size)
    starts = [round(index * room / max(1, count - 1)) for index in range(count)]
    return [torch.tensor([list(token_ids[start : start + size])]) for start in starts]


def all_windows(token_ids: Sequence[int], context_length: int) -> list[torch.Tensor]:
    """The whole text, or up to 16,384 tokens spread over it, as windows of one length, (1, up to 512) int64."""
    longest = min(_LONG_WINDOW, context_length)
    count = -(-len(token_ids) // longest)
    size = len(token_ids) // count
    starts = range(0, count * size, size)
    step = -(-len(starts) * size // MOST_TOKENS)
    return [torch.tensor([list(token_ids[start : start + size])]) for start in starts[::step]]


def layer_influence(module: PreTrainedModel, token_ids: Sequence[int], context_length: int) -> dict[int, float]:
    """Index of each layer -> influence, 0 if the layer changes nothing. Cost: eight passes of 256 tokens."""
    names = decoder_layers(module)
    sums = dict.fromkeys(names, 0.0)
    for ids in windows(token_ids, context_length):
        with observed(module, names) as seen, torch.no_grad():
            module(input_ids=ids, use_cache=False)
        for index, [(before, output)] in seen.items():
            sums[index] += _distance(before, _tensor(output))
    return sums


def attention_influence(module: PreTrainedModel, token_ids: Sequence[int], context_length: int) -> dict[int, float]:
    """Layer index of each attention sublayer -> influence of adding its output to the layer's input. Cost: eight passes
    of 256 tokens."""
    attention = attention_sublayers(module)
    layers = {index: name for index, name in decoder_layers(module).items() if index in attention}
    sums = dict.fromkeys(attention, 0.0)
    for ids in windows(token_ids, context_length):
        with observed(module, layers) as outer, observed(module, attention) as inner, torch.no_grad():
            module(input_ids=ids, use_cache=False)
        for index, [(_, output)] in inner.items():
            before = outer[index][0][0]
            sums[index] += _distance(before, before + _tensor(output))
    return sums


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((1 - torch.cosine_similarity(before, after, dim=-1)).mean())


def _tensor(output: object) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor), "layers and attention return a tensor first"
    return found
