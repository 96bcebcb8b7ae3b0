"""How far one distribution of the next token is from another: Kullback-Leibler divergence, in nats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities of each row of logits (n, vocab_size)."""
    # In place where possible: new arrays of this size are new pages, which cost more than the arithmetic.
    shifted = logits - logits.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(sums).astype(np.float32)
    return np.asarray(shifted, np.float32)


def divergence(expected: NDArray[np.float32], got: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence of each row of log probabilities (n, vocab_size) from the expected one, (n), in nats.

    NaN in, NaN out: the caller decides what that means.
    """
    parts = np.exp(expected)
    parts *= expected - got
    return np.asarray(parts.sum(axis=1, dtype=np.float64))


def lead(log_probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """The difference in probability between the first choice and the second, for each row (n, vocab_size)."""
    rows, first = np.arange(len(log_probabilities)), log_probabilities.argmax(axis=1)
    others = log_probabilities.copy()
    others[rows, first] = -np.inf
    best = np.stack([log_probabilities[rows, first], others.max(axis=1)])
    return np.asarray(np.exp(best[0], dtype=np.float64) - np.exp(best[1], dtype=np.float64))
