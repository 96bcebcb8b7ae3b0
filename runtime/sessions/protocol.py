"""What a session is: one growing sequence in a model, token ids in, logits out.

The numpy stand-in behind the same protocol is `edgelm.runtime.fake.FakeSession`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Prompts are fed in pieces, which bound the memory of a step. onnxruntime's attention computes what lies above the
# diagonal of a piece, too: with 384 tokens a prompt takes 7 to 11 % longer than with 256. Compiled kernels arrange
# keys, values and weights once a piece instead: with 384 it takes 4 % less, and with more no less (docs/notes/).
PIECE_TOKENS, KERNELS_PIECE_TOKENS = 256, 384
# Draft tokens that a step checks at most, behind the token that is known.
MOST_GUESSES = 16


class Session(Protocol):
    """One sequence in a model. Not safe between threads: whoever owns it takes turns."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Append tokens and compute the logits of the last `keep` of them; 0, where a prompt goes on behind them.

        Returns: (keep, vocab_size) float32, valid until the next step. 0 <= keep <= len(token_ids), and length +
        len(token_ids) must not pass the context length; both are the caller's to hold. Raises: SessionError.
        """

    def expect(self, positions: int) -> None:
        """Tell how long the text is likely to become, so that room for it is made at once. It may become longer."""

    def can_rewind(self, length: int) -> bool:
        """Whether `rewind` can go back to this length. To 0 it always can; a recurrence knows no way back to others."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on; 0 <= length <= self.length, and `can_rewind(length)`."""

    def close(self) -> None:
        """Free the graph and the cache. Calling it again does nothing."""


def least_rows(session: Session) -> int:
    """Rows that each step of a session has, were it for one token; those beyond its tokens are padding."""
    return int(getattr(session, "least_rows", 1))


def best_piece(session: Session) -> int:
    """Tokens of a prompt that a session takes at once: fewer or more are slower."""
    return int(getattr(session, "piece_tokens", PIECE_TOKENS))
