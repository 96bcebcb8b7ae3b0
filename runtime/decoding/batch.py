"""Token ids to token ids for several texts at once: one step of the graph gives each of them its next token.

A text's row leaves as it ends, and the next one that waits takes its place. Knows no text, no files and no onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .sequence import Chooser, never, shortened


class RowsSession(Protocol):
    """Several sequences in a model, in rows that are numbered from 0 without a gap. Not safe between threads.

    piece_tokens: tokens of a prompt that are best fed at once.
    """

    max_rows: int
    piece_tokens: int

    def add(self) -> None:
        """Begin an empty row behind the others; there are less than `max_rows`."""

    def copy(self, row: int, target: int, length: int) -> None:
        """Let an empty row begin with the first positions of another one."""

    def remove(self, row: int) -> None:
        """Forget a row. The last one moves into its place."""

    def rewind(self, row: int, length: int) -> None:
        """Forget a row's positions from `length` on."""

    def feed(self, row: int, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to one row. Returns: the logits (vocab_size) of the last one, valid until the next `feed`.
        Raises: SessionError."""

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each row. Returns: the logits (rows, vocab_size), valid until the next `step`.
        Raises: SessionError."""


class RowPrefixes(Protocol):
    """Where beginnings of texts are found that no row holds, and kept."""

    def restore(self, row: int, token_ids: Sequence[int]) -> int:
        """Lengthen what a row holds of a text by what is known; its positions then, less than the text's tokens."""

    def keep(self, row: int, token_ids: Sequence[int]) -> None:
        """Store what a row holds, which are these tokens."""


@dataclass(eq=False)
class Row:
    """One text: its prompt and how it goes on, as in `Sequencer.generate`.

    keep: None where nothing can follow a full context (max_tokens then fits into it), or what stays of it, as in
    `Sequencer.generate_sliding`. Set `ended` to end the row before its next token.
    """

    token_ids: Sequence[int]
    max_tokens: int
    chooser: Chooser
    stop_ids: Collection[int]
    interrupted: Callable[[], bool] = never
    keep: int | None = None
    ended: bool = False
    # What the model is to know, how much of it is in the cache, how much of the prompt was known before it,
    # and how many tokens were chosen.
    known: list[int] = field(init=False)
    fed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    chosen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.known = list(self.token_ids)


class Batch:
    """Decodes rows. Use it once. Each row gets the tokens that it would get alone, where the session's rows do."""

    def __init__(
        self,
        session: RowsSession,
        rows: Iterable[Row],
        context_length: int,
        prefixes: RowPrefixes | None = None,
    ) -> None:
        """prefixes: those that `session` reads and writes."""
        self._session = session
        self._prefixes = prefixes
        self._context = context_length
        self._waiting = iter(rows)
        self._rows: list[Row] = []
        # Rows that are to be fed more than one token, before the next common step.
        self._unfed: list[Row] = []

    def tokens(self) -> Generator[tuple[Row, int | None], None, None]:
        """Each row's tokens as they come, and None for the row's end. Raises: SessionError, and what choosers raise.

        Where it ends early, what was computed for the rows is kept.
        """
        try:
            yield from self._run()
        finally:
            for index in range(len(self._rows)):
                self._keep(index)

    def _run(self) -> Iterator[tuple[Row, int | None]]:
        while True:
            if self._unfed:
                yield from self._feed(self._rows.index(self._unfed.pop()))
            elif len(self._rows) < self._session.max_rows and (row := next(self._waiting, None)) is not None:
                self._admit(row)
            elif self._rows:
                yield from self._step()
            else:
                return

    def _admit(self, row: Row) -> None:
        self._session.add()
        shared = [_common(row, other) for other in self._rows]
        if any(shared):
            row.fed = row.reused = max(shared)
            self._session.copy(shared.index(row.fed), len(self._rows), row.fed)
        self._rows.append(row)
        self._unfed.append(row)
        if self._prefixes is not None:
            row.fed = row.reused = self._prefixes.restore(len(self._rows) - 1, row.known)

    def _keep(self, index: int) -> None:
        if self._prefixes is not None:
            row = self._rows[index]
            self._prefixes.keep(index, row.known[: row.fed])

    def _feed(self, index: int) -> Iterator[tuple[Row, int | None]]:
        row = self._rows[index]
        while row.fed < len(row.known) and not row.interrupted():
            piece = row.known[row.fed : row.fed + self._session.piece_tokens]
            logits = self._session.feed(index, piece)
            row.fed += len(piece)
        if row.interrupted():
            yield from self._leave(index)
        else:
            yield from self._take(index, logits)

    def _step(self) -> Iterator[tuple[Row, int | None]]:
        logits = self._session.step([row.known[-1] for row in self._rows])
        # From the last row to the first: what moves into a place that becomes free has had its turn.
        for index in reversed(range(len(self._rows))):
            self._rows[index].fed += 1
            yield from self._take(index, logits[index])

    def _take(self, index: int, logits: NDArray[np.float32]) -> Iterator[tuple[Row, int | None]]:
        row = self._rows[index]
        token = row.chooser.choose(logits)
        row.known.append(token)
        row.chosen += 1
        yield row, token
        if row.ended or token in row.stop_ids or row.chosen == row.max_tokens or row.interrupted():
            yield from self._leave(index)
        elif row.keep is not None and len(row.known) > self._context:
            self._keep(index)
            row.known = shortened(row.known, row.keep)
            row.fed = row.keep
            self._session.rewind(index, row.keep)
            self._unfed.append(row)

    def _leave(self, index: int) -> Iterator[tuple[Row, int | None]]:
        self._keep(index)
        row = self._rows[index]
        last = self._rows.pop()
        if last is not row:
            self._rows[index] = last
        self._session.remove(index)
        yield row, None


def _common(row: Row, other: Row) -> int:
    """How many tokens at the beginning of a row another one has in the cache; the last one must run to give logits."""
    limit = min(len(row.known) - 1, other.fed)
    return next((index for index in range(limit) if row.known[index] != other.known[index]), limit)
