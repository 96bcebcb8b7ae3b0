"""How far one distribution of the next token is from another: Kullback-Leibler divergence, in nats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities of each row of logits (n, vocab_size)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(sums).astype(np.float32), np.float32)


def divergence(expected: NDArray[np.float32], got: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence of each row of log probabilities (n, vocab_size) from the expected one, (n), in nats.

    What is not a number stays one: the caller decides what that means.
    """
    return np.asarray((np.exp(expected) * (expected - got)).sum(axis=1, dtype=np.float64))
