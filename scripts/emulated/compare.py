"""The difference between two machines' results of the same bundle on the same texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.runtime.evaluation.scoring import negative_log_likelihood


@dataclass(frozen=True)
class Outcome:
    """One machine's results of a bundle: logits (n, vocabulary) float32, the tokens that they predict (n), the greedy
    answer, the digest of the logits, and whether cuts changed no bit."""

    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    tokens: list[int]
    digest: str
    exact: bool
    saturates: bool

    @staticmethod
    def read(file: Path, told: dict[str, object]) -> Outcome:
        """Read the output files of `device.py` and its JSON line."""
        with np.load(file) as arrays:
            logits, targets, tokens = (arrays[name] for name in ("logits", "targets", "tokens"))
        return Outcome(
            logits, targets, tokens.tolist(), str(told["digest"]), bool(told["exact"]), bool(told["saturates"])
        )

    @property
    def perplexity(self) -> float:
        """Perplexity of the texts, each from an empty context."""
        return math.exp(float(negative_log_likelihood(self.logits, self.targets).mean()))


@dataclass(frozen=True)
class Difference:
    """One machine against another.

    largest: difference of two logits; same_token: share of the positions with the same most likely token; perplexity:
    relative change; shift: mean signed difference of the logits, in units of their standard deviation; gain: relative
    change of the logits' size (they shrink where sums saturate); kl: mean KL divergence of the next token's
    distribution, in nats.
    """

    largest: float
    same_token: float
    perplexity: float
    shift: float
    gain: float
    kl: float


def difference(reference: Outcome, other: Outcome) -> Difference:
    """The other outcome relative to the reference."""
    one, two = reference.logits.astype(np.float64), other.logits.astype(np.float64)
    centered = one - one.mean(axis=1, keepdims=True)
    return Difference(
        largest=float(np.abs(two - one).max()),
        same_token=float((one.argmax(axis=1) == two.argmax(axis=1)).mean()),
        perplexity=other.perplexity / reference.perplexity - 1,
        shift=float((two - one).mean() / centered.std()),
        gain=float((centered * two).sum() / (centered * centered).sum() - 1),
        kl=divergence(reference, other),
    )


def divergence(reference: Outcome, other: Outcome) -> float:
    """Mean KL divergence of the other's next-token distributions from the reference's, in nats."""
    one, two = (_log_softmax(outcome.logits.astype(np.float64)) for outcome in (reference, other))
    return float((np.exp(one) * (one - two)).sum(axis=1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
