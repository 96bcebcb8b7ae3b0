"""The prompts on which the fp32 graph is compared with torch, and the pieces in which it gets them. They are the same
each time.

Prompts from the text, prompts of random tokens (which use other rows of the embedding), and one long prompt, beyond
each sliding window and beyond the original context of a scaled rotary embedding, if that is not too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.bundle.manifest import Model
from ...runtime.sessions.protocol import KERNELS_PIECE_TOKENS

_TEXT_PROMPTS, _TEXT_TOKENS, _TEXT_STEPS = 4, 16, 32
_RANDOM_PROMPTS, _RANDOM_TOKENS, _RANDOM_STEPS = 2, 24, 16
# Longer than the runtime's pieces, so that one prompt takes two of them.
_LONG_TOKENS, _LONG_STEPS = KERNELS_PIECE_TOKENS + 40, 16
# A prompt of this length takes torch seconds on models of a billion parameters. Limits beyond it are reported as
# untested.
_LONGEST = 600
# How far the long prompt goes beyond the last limit, so that many positions are affected.
_BEYOND = 40


@dataclass(frozen=True)
class Trial:
    """A prompt, and the most greedy steps that follow it."""

    prompt: list[int]
    steps: int


@dataclass(frozen=True)
class Limit:
    """A position beyond which a model computes differently, and its name."""

    tokens: int
    what: str


def make_trials(token_ids: Sequence[int], shape: Model, config: Any) -> tuple[list[Trial], tuple[str, ...]]:
    """The prompts for a model, within its context, and the limits that they do not reach.

    token_ids: the text; config: of the model in transformers. Cost: 7 prompts of at most 600 tokens. The four from the
    text have equal length and steps, and so have the two random ones: torch decodes three batches, 64 steps in all.
    """
    room = max(1, shape.context_length - 1)
    step = max(1, (len(token_ids) - _TEXT_TOKENS) // _TEXT_PROMPTS)
    starts = list(range(0, max(1, len(token_ids) - _TEXT_TOKENS), step))[:_TEXT_PROMPTS]
    trials = [Trial(list(token_ids[start : start + min(_TEXT_TOKENS, room)]), _TEXT_STEPS) for start in starts]
    drawn = np.random.default_rng(0).integers(shape.vocab_size, size=(_RANDOM_PROMPTS, min(_RANDOM_TOKENS, room)))
    trials += [Trial(prompt, _RANDOM_STEPS) for prompt in drawn.tolist()]
    limits = [limit for limit in _limits(shape, config) if limit.tokens < shape.context_length]
    reach = min(_LONGEST, room)
    length = min(reach, max([_LONG_TOKENS, *(limit.tokens + _BEYOND for limit in limits if limit.tokens < reach)]))
    trials.append(Trial((list(token_ids) * (1 + length // len(token_ids)))[:length], _LONG_STEPS))
    return trials, tuple(f"{limit.what} of {limit.tokens} tokens" for limit in limits if limit.tokens >= reach)


def pieces(token_ids: Sequence[int], draw: np.random.Generator) -> Iterator[list[int]]:
    """The tokens in pieces of 1 to 127 tokens, cut at random, short pieces as often as long ones."""
    begin = 0
    while begin < len(token_ids):
        size = int(2 ** draw.uniform(0, 7))
        yield list(token_ids[begin : begin + size])
        begin += size


def _limits(shape: Model, config: Any) -> list[Limit]:
    windows = {layer.window for layer in shape.layers if layer is not None and layer.window is not None}
    limits = [Limit(window, "sliding window") for window in sorted(windows)]
    originals = sorted(set(_originals(getattr(config, "rope_parameters", None))))
    return limits + [Limit(original, "original context of the rotary embedding") for original in originals]


def _originals(parameters: Any) -> Iterator[int]:
    """Original context lengths in rope parameters: one set, or one set for each kind of layer."""
    if not isinstance(parameters, dict):
        return
    for key, value in parameters.items():
        if key == "original_max_position_embeddings" and isinstance(value, int):
            yield value
        else:
            yield from _originals(value)
