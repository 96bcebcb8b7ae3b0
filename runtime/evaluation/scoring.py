"""Score a text: logits at every position, perplexity. The same code judges a bundle at export and on the device.

A text longer than the window is scored in overlapping windows, as in transformers' guide to perplexity. Each window
starts with an empty cache and scores only the tokens that the window before it did not. So all tokens but the first
ones have at least `window - stride` tokens of context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError, SettingsError
from ..sessions.protocol import Session

DEFAULT_WINDOW = 512
_PIECE_TOKENS = 128


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens, with the window and stride used."""

    value: float
    tokens: int
    window: int
    stride: int

    def bits_per_byte(self, text: str) -> float:
        """Information content of the scored text: comparable between models with different tokenizers, while
        perplexity is per token. As `bits_per_byte` of EleutherAI's lm-evaluation-harness."""
        return self.tokens * math.log2(self.value) / len(text.encode())


def score(
    session: Session, token_ids: Sequence[int], window: int, stride: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Run a text through a session, from an empty cache.

    Yields: pairs of the next token at each scored position, (n) int64, and the logits that predict it,
    (n, vocab_size) float32, valid until the next pair. Every token but the text's first is scored once.
    Raises: SettingsError unless 1 <= stride < window.
    """
    if not 1 <= stride < window:
        raise SettingsError(
            f"the stride must be at least 1 and less than the window of {window} tokens, found {stride}"
        )
    scored = 1
    for begin in range(0, len(token_ids), stride):
        end = min(begin + window, len(token_ids))
        session.rewind(0)
        for start in range(begin, end - 1, _PIECE_TOKENS):
            piece = token_ids[start : min(start + _PIECE_TOKENS, end - 1)]
            # Row i of the piece predicts token start + i + 1.
            skip = min(max(0, scored - (start + 1)), len(piece))
            logits = session.step(piece, max(1, len(piece) - skip))
            if skip < len(piece):
                yield np.asarray(token_ids[start + 1 + skip : start + 1 + len(piece)], np.int64), logits
        scored = end
        if end == len(token_ids):
            return


def default_stride(window: int) -> int:
    """Half of a window, at least one token."""
    return max(1, window // 2)


def perplexity(
    session: Session, token_ids: Sequence[int], window: int = DEFAULT_WINDOW, stride: int | None = None
) -> Perplexity:
    """Perplexity of a text of at least two tokens. stride: half of the window, if not given. Raises: SessionError, if
    it is not finite."""
    stride = default_stride(window) if stride is None else stride
    total, count = 0.0, 0
    for targets, logits in score(session, token_ids, window, stride):
        total += float(negative_log_likelihood(logits, targets).sum())
        count += len(targets)
    try:
        value = math.exp(total / count)
    except OverflowError:  # above 709 nats a token
        value = math.inf
    if not math.isfinite(value):
        raise SessionError(f"the model has no finite perplexity ({total / count:.4g} nats a token): export it again")
    return Perplexity(value, count, window, stride)


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row: logits (n, vocab_size), targets (n) -> (n) float64."""
    largest = logits.max(axis=1)
    sums = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    return np.asarray(np.log(sums) + largest - chosen, np.float64)
