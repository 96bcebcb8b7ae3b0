"""A session in a few lines of numpy with the real one's protocol, for tests and for programs that embed edgelm.

`FakeSession` "knows" one rule: which token follows which, given the whole sequence so far. It computes no neural
network, needs no bundle, and records what it was asked, so that a test can count steps and rewinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .sessions.protocol import Capabilities

NextToken = Callable[[Sequence[int]], int]


class FakeSession:
    """A `Session` (`edgelm.runtime.sessions.protocol`) whose most likely next token is `next_token(tokens so far)`.

    `steps` lists the token ids of each step, `tokens` holds the sequence in the "cache".
    """

    def __init__(self, vocab_size: int, next_token: NextToken) -> None:
        self.vocab_size = vocab_size
        self.tokens: list[int] = []
        self.steps: list[list[int]] = []
        self.closed = False
        self._next_token = next_token
        self.capabilities = Capabilities()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Logits (keep, vocab_size): 1 for the token that follows, 0 elsewhere."""
        if not 0 <= keep <= len(token_ids):
            raise ValueError(f"keep must be 0 to {len(token_ids)}, found {keep}")
        self.steps.append(list(token_ids))
        self.tokens.extend(token_ids)
        logits = np.zeros((keep, self.vocab_size), np.float32)
        for row in range(keep):
            known = self.tokens[: len(self.tokens) - keep + row + 1]
            logits[row, self._next_token(known)] = 1.0
        return logits

    def expect(self, positions: int) -> None:
        """Do nothing: there is room for any text."""

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= len(self.tokens)

    def rewind(self, length: int) -> None:
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"cannot rewind {len(self.tokens)} tokens to {length}")
        del self.tokens[length:]

    def close(self) -> None:
        self.closed = True
