"""Token ids to token ids: feed a prompt in pieces, then choose the most likely token until told to stop.

Knows no text, no files and no onnxruntime: it works on any `Session`, and is tested on a fake one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .session import Session

# Pieces bound the memory of a step and are faster than a whole prompt at once, because attention computes nothing above
# the diagonal of a piece. Measured at 1,900 tokens (docs/benchmarks.md): 64 to 512 tokens differ by 25 %.
PIECE_TOKENS = 256


class Sequencer:
    """A session and the token ids that are in its cache, so that a new prompt runs only what is new.

    Reuse is exact: with the default scheme, logits are bit for bit those of a cold run, wherever the text was cut.
    Not safe between threads.
    """

    def __init__(self, session: Session, piece_tokens: int = PIECE_TOKENS) -> None:
        self._session = session
        self._piece_tokens = piece_tokens
        self._cached: list[int] = []

    def reusable(self, token_ids: Sequence[int]) -> int:
        """How many tokens of this prompt are in the cache: the longest common prefix, less than the whole prompt,
        since the last token must run to give logits."""
        limit = min(len(self._cached), len(token_ids) - 1)
        for index in range(limit):
            if self._cached[index] != token_ids[index]:
                limit = index
                break
        return limit if limit > 0 and self._session.can_rewind(limit) else 0

    def feed(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Bring the cache to hold exactly `token_ids`, reusing what it holds, piece by piece.

        Yields: the logits (1, vocab_size) of each piece's last token; the last ones yielded are the prompt's. Stop
        iterating to cancel: what ran stays in the cache and can be reused.
        """
        start = self.reusable(token_ids)
        self._session.rewind(start)
        del self._cached[start:]
        for begin in range(start, len(token_ids), self._piece_tokens):
            yield self._append(token_ids[begin : begin + self._piece_tokens])

    def greedy(self, token_ids: Sequence[int], max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        """Token ids that follow a prompt, each the most likely one (the lowest id among equals).

        Ends after `max_tokens`, or after a token of `stop_ids`, which is yielded as the last one so that the caller
        can tell the two ends apart.
        """
        for logits in self.feed(token_ids):
            last = logits
        for count in range(1, max_tokens + 1):
            token = int(last[-1].argmax())
            yield token
            if token in stop_ids or count == max_tokens:
                return
            last = self._append([token])

    def _append(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        # A step that fails or is interrupted leaves the session at its old length; the record follows only after it.
        logits = self._session.step(token_ids)
        self._cached.extend(token_ids)
        return logits
