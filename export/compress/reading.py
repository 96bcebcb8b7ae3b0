"""A module reads a text in one forward pass: how well it predicts it, and how far it is from a reference.

The text is cut into windows, each of which predicts the token after it as well, so that every token but the first is
predicted once and none is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .progress import tracked

if TYPE_CHECKING:
    pass

WINDOW = 512
_ROWS = 64  # of logits whose distributions are computed at once: some 12 MB of a vocabulary of 49,152
_LEAST = -6e4  # float16 holds no less


@dataclass(frozen=True)
class Reading:
    """loss: mean negative log-likelihood, nats a token; kl: divergence of the predictions from the reference's, nats a
    token; same: share of the tokens, 0 to 1, at which both hold one token most likely."""

    loss: float
    kl: float
    same: float

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where no float holds it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Reader:
    """One text, and what a reference says to it.

    Memory: 2 bytes for each token of the text and each of the vocabulary, once the reference has read it.
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
        """Take a module, in evaluation mode, as the reference from now on."""
        self._expected, loss = [], 0.0
        for logits, targets in self._predictions(module):
            says = torch.log_softmax(logits.float(), -1)
            loss -= float(_chosen(says, targets))
            self._expected.append((says.clamp_min(_LEAST).half().cpu(), says.argmax(-1).cpu()))
        return Reading(loss / self.tokens, 0.0, 1.0)

    def read(self, module: torch.nn.Module) -> Reading:
        """A module, in evaluation mode, beside the reference. Where there is none yet, the module is it."""
        if not self._expected:
            return self.expect(module)
        expected = iter(self._expected)
        sums = torch.zeros(3, dtype=torch.float64)
        for logits, targets in self._predictions(module):
            sums += _sums(logits, targets, *next(expected))
        loss, kl, same = (float(value) / self.tokens for value in sums)
        return Reading(loss, kl, same)

    def _predictions(self, module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (n, vocabulary) in blocks of rows, and the tokens (n) that they predict."""
        device = next(module.parameters()).device
        starts = range(0, self.tokens, self._window)
        for start in tracked(starts, "windows read"):
            ids = self._ids[start : start + self._window + 1].to(device)
            with torch.no_grad():
                logits = module(input_ids=ids[None, :-1], use_cache=False).logits[0]
            yield from zip(torch.split(logits, _ROWS), torch.split(ids[1:], _ROWS), strict=True)


def _sums(logits: torch.Tensor, targets: torch.Tensor, says: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sums over rows of the loss, of the divergence, and of the rows with the same first choice, (3) float64."""
    got = torch.log_softmax(logits.float(), -1)
    # float16 holds log probabilities to 2^-12 of their size: they are made a distribution again.
    wanted = torch.log_softmax(says.to(got.device).float(), -1)
    kl = (wanted.exp() * (wanted - got)).double().sum()
    same = (got.argmax(-1) == first.to(got.device)).double().sum()
    return torch.stack([-_chosen(got, targets), kl, same]).cpu()


def _chosen(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the targets' log probabilities, float64."""
    return log_probabilities.gather(1, targets[:, None]).double().sum()
