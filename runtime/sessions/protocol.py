"""The protocol of a session: one growing sequence in a model, token ids in, logits out; and its optional capabilities.

`edgelm.runtime.fake.FakeSession` implements it in numpy, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Prompts are fed in pieces, which limits the memory of a step. onnxruntime's attention also computes above the diagonal
# of a piece: with pieces of 384 tokens a prompt takes 7 to 11 % longer than with 256. Compiled kernels rearrange keys,
# values and weights once a piece: with 384 a prompt takes 4 % less, and with more it gains nothing (docs/notes/).
PIECE_TOKENS, KERNELS_PIECE_TOKENS = 256, 384
# The most draft tokens that a step verifies, besides the known token.
MOST_DRAFTS = 16


class Session(Protocol):
    """One sequence in a model. Not safe between threads."""

    @property
    def capabilities(self) -> Capabilities:
        """What the session offers beyond this protocol. Constant for the session's life."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Append tokens and compute the logits of the last `keep` of them; 0 while more of a prompt follows.

        Returns: (keep, vocab_size) float32, valid until the next step. 0 <= keep <= len(token_ids), and length +
        len(token_ids) must not exceed the context length; the caller ensures both. Raises: SessionError, which leaves
        the length as it was.
        """

    def expect(self, positions: int) -> None:
        """Announce how long the text is likely to become, so that room is made at once. It may become longer."""

    def can_rewind(self, length: int) -> bool:
        """Whether `rewind` can go back to this length. 0 is always possible; a recurrent model can go back only
        there."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on; 0 <= length <= self.length, and `can_rewind(length)`."""

    def close(self) -> None:
        """Free the graph and the cache. Calling it again does nothing."""


class PicksTokens(Protocol):
    """A session that can choose the most likely tokens itself, on its device."""

    def likeliest(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.int64]:
        """Append tokens as `Session.step` does. Returns: (keep) ids, the most likely one behind each of the last
        `keep` tokens, the lowest among equals. 0 <= keep <= len(token_ids)."""


class Rows(Protocol):
    """Several texts in one model, in rows that are numbered from 0. Row 0 is the session's own text.

    All rows are empty at first. Not safe between threads.
    """

    @property
    def max_rows(self) -> int:
        """How many rows there can be."""

    def length(self, row: int) -> int:
        """Positions of a row in the cache."""

    def can_rewind(self, row: int, length: int) -> bool:
        """As `Session.can_rewind`."""

    def rewind(self, row: int, length: int) -> None:
        """As `Session.rewind`."""

    def copy(self, row: int, target: int, length: int) -> None:
        """Replace the contents of the row `target` by the first positions of `row`."""

    def swap(self, row: int, other: int) -> None:
        """Exchange what two rows hold."""

    def expect(self, rows: int, positions: int) -> None:
        """Announce how many rows are in use from now on, and how long the longest is likely to become. Rows behind them
        are emptied."""

    def has_room(self, rows: int, positions: int) -> bool:
        """Whether there is memory for so many rows, if the longest has so many positions."""

    def feed(self, row: int, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Append tokens to one row, as `Session.step`."""

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each of the first rows. Returns: the logits (rows, vocab_size), valid until the next
        step. Raises: SessionError, which leaves all lengths as they were."""


class Blocks(Protocol):
    """Keys and values of rows as bytes. The prefix cache uses it."""

    def block_bytes(self, positions: int) -> int:
        """The size of a block of so many positions."""

    def length(self, row: int) -> int:
        """As `Rows.length`."""

    def rewind(self, row: int, length: int) -> None:
        """As `Rows.rewind`."""

    def read(self, row: int, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        """Copy what the KV cache holds for positions begin to end - 1 of a row into a block of their size."""

    def append(self, row: int, block: NDArray[np.uint8], positions: int) -> None:
        """Append what `read` gave for so many positions to a row, as if their tokens had been run. Raises:
        MemoryShortageError."""


@dataclass(frozen=True)
class Capabilities:
    """What a session offers.

    piece_tokens: the fastest number of a prompt's tokens in one step. least_rows: the smallest number of rows that a
    step computes; those beyond its tokens are padding. device: onnxruntime's name of where it computes. The others are
    None if the session does not have them; `rows` and `blocks` see the same texts as the session itself.
    """

    piece_tokens: int = PIECE_TOKENS
    least_rows: int = 1
    device: str = "cpu"
    rows: Rows | None = None
    blocks: Blocks | None = None
    picks: PicksTokens | None = None


class OneRow:
    """A session as `Rows` with a single row."""

    max_rows = 1

    def __init__(self, session: Session) -> None:
        self._session = session

    def length(self, row: int) -> int:
        return self._session.length

    def can_rewind(self, row: int, length: int) -> bool:
        return self._session.can_rewind(length)

    def rewind(self, row: int, length: int) -> None:
        self._session.rewind(length)

    def copy(self, row: int, target: int, length: int) -> None:
        raise ValueError("a session of one text has no other row")

    def swap(self, row: int, other: int) -> None:
        raise ValueError("a session of one text has no other row")

    def expect(self, rows: int, positions: int) -> None:
        self._session.expect(positions)

    def has_room(self, rows: int, positions: int) -> bool:
        return rows == 1

    def feed(self, row: int, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        return self._session.step(token_ids, keep)

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self._session.step(token_ids)
