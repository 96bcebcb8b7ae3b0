"""Loss of a module on a text, and its KL divergence from a reference module.

The text is cut into windows. Each window also predicts the first token of the next one, so every token but the first is
predicted once, and no position is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .progress import tracked

WINDOW = 512
_ROWS = 64  # rows of logits per log_softmax: about 12 MB with a vocabulary of 49,152
_LEAST = -6e4  # close to float16's lowest finite number


@dataclass(frozen=True)
class Reading:
    """loss: mean negative log-likelihood, nats a token; kl: KL divergence from the reference, nats a token; same: share
    of the positions, 0 to 1, where the most likely token is the reference's."""

    loss: float
    kl: float
    same: float

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinity if it exceeds the range of float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Reader:
    """A text, and the reference's predictions on it.

    Memory: 2 bytes x tokens of the text x vocabulary, after `expect`.
    """

    def __init__(self, token_ids: Sequence[int], context_length: int) -> None:
        """token_ids: two or more."""
        self._ids = torch.tensor(list(token_ids))
        self._window = min(WINDOW, context_length)
        self._expected: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self._ids) - 1

    def expect(self, module: torch.nn.Module) -> Reading:
        """Make a module in evaluation mode the reference."""
        self._expected, loss = [], 0.0
        for logits, targets in self._predictions(module):
            says = torch.log_softmax(logits.float(), -1)
            loss -= float(_chosen(says, targets))
            self._expected.append((says.clamp_min(_LEAST).half().cpu(), says.argmax(-1).cpu()))
        return Reading(loss / self.tokens, 0.0, 1.0)

    def read(self, module: torch.nn.Module) -> Reading:
        """Compare a module in evaluation mode with the reference. Without a reference, the module becomes it."""
        if not self._expected:
            return self.expect(module)
        expected = iter(self._expected)
        sums = torch.zeros(3, dtype=torch.float64)
        for logits, targets in self._predictions(module):
            sums += _sums(logits, targets, *next(expected))
        loss, kl, same = (float(value) / self.tokens for value in sums)
        return Reading(loss, kl, same)

    def _predictions(self, module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits (rows, vocabulary) and the tokens (rows) that they predict."""
        device = next(module.parameters()).device
        starts = range(0, self.tokens, self._window)
        for start in tracked(starts, "windows read"):
            ids = self._ids[start : start + self._window + 1].to(device)
            with torch.no_grad():
                logits = module(input_ids=ids[None, :-1], use_cache=False).logits[0]
            yield from zip(torch.split(logits, _ROWS), torch.split(ids[1:], _ROWS), strict=True)


def _sums(logits: torch.Tensor, targets: torch.Tensor, says: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sums over rows of loss, KL divergence and equal most likely tokens, (3) float64."""
    got = torch.log_softmax(logits.float(), -1)
    # Rounding to float16 (relative error 2^-12) leaves probabilities that do not sum to 1: normalize again.
    wanted = torch.log_softmax(says.to(got.device).float(), -1)
    kl = (wanted.exp() * (wanted - got)).double().sum()
    same = (got.argmax(-1) == first.to(got.device)).double().sum()
    return torch.stack([-_chosen(got, targets), kl, same]).cpu()


def _chosen(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the targets' log probabilities, float64."""
    return log_probabilities.gather(1, targets[:, None]).double().sum()
