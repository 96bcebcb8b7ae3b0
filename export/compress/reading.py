"""Loss of a module on a text, and its KL divergence from a reference module.

The text is cut into windows. Each window also predicts the first token of the next one, so every token but the first is
predicted once, and no position is computed twice.

A module with fewer tokens (`vocabulary/`) reads the same windows, with removed tokens in parts. The loss of a token
is that of all its parts. The KL divergence compares predictions of whole tokens, where the reference's probability of
a removed token counts as its first part's; predictions inside a token are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .progress import tracked

if TYPE_CHECKING:
    from .vocabulary.trimmed import Trimmed

WINDOW = 512
_ROWS = 64  # rows of logits per log_softmax: about 12 MB with a vocabulary of 49,152
_LEAST = -6e4  # close to float16's lowest finite number


@dataclass(frozen=True)
class Reading:
    """loss: mean negative log-likelihood, nats a token; kl: KL divergence from the reference, nats a token; same: share
    of the positions, 0 to 1, where the most likely token is the reference's. Tokens are those of the text given."""

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

    def __init__(self, token_ids: Sequence[int], context_length: int, trimmed: Trimmed | None = None) -> None:
        """token_ids: two or more; trimmed: the tokens of modules that have fewer than the reference."""
        self._ids = torch.tensor(list(token_ids))
        self._trimmed = trimmed
        self._window = min(WINDOW, context_length)
        while trimmed is not None and self._longest(trimmed) > context_length:
            self._window //= 2
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

    def read(self, module: torch.nn.Module, *, split: bool = False) -> Reading:
        """Compare a module in evaluation mode with the reference. Without a reference, the module becomes it. split:
        whether the module has the tokens of `trimmed`."""
        if not self._expected:
            return self.expect(module)
        sums = self._split_sums(module) if split else self._sums(module)
        loss, kl, same = (float(value) / self.tokens for value in sums)
        return Reading(loss, kl, same)

    def _sums(self, module: torch.nn.Module) -> torch.Tensor:
        expected = iter(self._expected)
        sums = torch.zeros(3, dtype=torch.float64)
        for logits, targets in self._predictions(module):
            got, wanted = torch.log_softmax(logits.float(), -1), next(expected)
            sums[0] -= _chosen(got, targets)
            sums[1:] += _compared(got, _normalized(wanted[0], got.device), wanted[1])
        return sums

    def _split_sums(self, module: torch.nn.Module) -> torch.Tensor:
        assert self._trimmed is not None, "the reader was made without the tokens that remain"
        expected = iter(self._expected)
        sums = torch.zeros(3, dtype=torch.float64)
        for window in self._windows():
            ids = torch.tensor(self._trimmed.split(window.tolist()))
            ends = torch.tensor([len(self._trimmed.parts[token]) for token in window.tolist()]).cumsum(0) - 1
            logits = _logits(module, ids[:-1])[ends[0] :]
            for some, targets in zip(torch.split(logits, _ROWS), torch.split(ids[ends[0] + 1 :], _ROWS), strict=True):
                sums[0] -= _chosen(torch.log_softmax(some.float(), -1), targets.to(some.device))
            for some in torch.split(logits[ends[:-1] - ends[0]], _ROWS):
                got, (says, _) = torch.log_softmax(some.float(), -1), next(expected)
                wanted = self._trimmed.spoken(_normalized(says, got.device).exp())
                sums[1:] += _compared(got, wanted, wanted.argmax(-1))
        return sums

    def _predictions(self, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits (rows, vocabulary) and the tokens (rows) that they predict."""
        for ids in self._windows():
            logits = _logits(module, ids[:-1])
            targets = ids[1:].to(logits.device)
            yield from zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True)

    def _windows(self) -> Iterator[torch.Tensor]:
        """Yield the windows (up to window + 1 tokens). Each begins with the last token of the one before."""
        for start in tracked(range(0, self.tokens, self._window), "windows read"):
            yield self._ids[start : start + self._window + 1]

    def _longest(self, trimmed: Trimmed) -> int:
        """The most tokens that a window has in parts."""
        counts = torch.tensor([len(trimmed.parts[token]) for token in self._ids.tolist()])
        return max(int(part.sum()) for part in torch.split(counts, self._window))


def _logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of token ids (tokens), on the module's device."""
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids[None].to(next(module.parameters()).device), use_cache=False).logits
    return found[0]


def _normalized(says: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Expected log probabilities in float32. Rounding to float16 (relative error 2^-12) leaves probabilities that do
    not sum to 1."""
    return torch.log_softmax(says.to(device).float(), -1)


def _compared(got: torch.Tensor, wanted: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sums over rows of KL divergence and equal most likely tokens, (2) float64. got, wanted: log probabilities."""
    kl = (wanted.exp() * (wanted - got)).double().sum()
    same = (got.argmax(-1) == first.to(got.device)).double().sum()
    return torch.stack([kl, same]).cpu()


def _chosen(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the targets' log probabilities, float64."""
    return log_probabilities.gather(1, targets[:, None]).double().sum()
