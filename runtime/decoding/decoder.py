"""Token ids to token ids: feed prompts in pieces, then choose and feed one token a step for each text, until it ends.

One text is a batch of one row. Knows no text, no files and no onnxruntime: it works on any `Session`, and is tested on
fake ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from ..errors import EdgelmError, MemoryShortageError
from ..sessions.protocol import OneRow, Session
from .pieces import Pieces
from .row import Row

Event = tuple[Row, int | EdgelmError | None]


class Prefixes(Protocol):
    """The prefix cache as the decoder uses it: keeps the beginnings of texts and finds them again."""

    def restore(self, row: int, token_ids: Sequence[int]) -> None:
        """Extend a row, which holds the first of these tokens, by what is cached, but never to all of them. Raises:
        MemoryShortageError; the row then still holds a beginning of the text."""

    def keep(self, row: int, token_ids: Sequence[int]) -> None:
        """Store what a row holds. token_ids: all its tokens."""


class Decoder:
    """The rows that are decoded now, over one session. Not safe between threads.

    A step runs the session's first rows, so rows whose prompt is fed come first; rows that wait for a part of their
    prompt are behind them. When no row is decoded, the first row still holds the last text, so that the next prompt
    runs only its new part. Reuse is exact where the session is (`Manifest.exact_under_cuts`): logits are bit for bit
    those of a cold run, wherever a text was cut and whatever the other rows are.
    """

    def __init__(
        self,
        session: Session,
        context_length: int | None = None,
        *,
        prefixes: Prefixes | None = None,
        piece_tokens: int | None = None,
        max_rows: int = 1,
        bounded_pieces: bool = False,
    ) -> None:
        """context_length: needed for rows with `keep`. prefixes: over the same session. piece_tokens: of a prompt, fed
        at once (None: the session's number). bounded_pieces: shorten pieces if a row's deadline is near."""
        capabilities = session.capabilities
        self._session = (capabilities.rows if max_rows > 1 else None) or OneRow(session)
        self.max_rows = min(max_rows, self._session.max_rows)
        # A session picks tokens for its own text only, so not when there may be several rows.
        self._picks = capabilities.picks if self.max_rows == 1 else None
        self._free_drafts = capabilities.least_rows - 1
        self._pieces = Pieces(piece_tokens or capabilities.piece_tokens, bounded_pieces)
        self._context = context_length
        self._prefixes = prefixes
        self._rows: list[Row] = []
        self._fed = 0
        self._idle: list[int] = []

    @property
    def rows(self) -> Sequence[Row]:
        """The rows that are decoded now, in no particular order."""
        return self._rows

    def has_place(self, prompt_tokens: int) -> bool:
        """Whether a row with such a prompt may be admitted: there are rows left, and memory for one more."""
        if not self._rows:
            return True
        longest = max(prompt_tokens + 1, *(len(row.known) + 1 for row in self._rows))
        return len(self._rows) < self.max_rows and self._session.has_room(len(self._rows) + 1, longest)

    def reusable(self, token_ids: Sequence[int]) -> int:
        """How many tokens of this prompt the session still holds from the last text, when no row is decoded: the
        longest common prefix, but never the whole prompt, since the last token must run to give logits."""
        common = _common(token_ids, self._idle)
        return common if common and self._session.can_rewind(0, common) else 0

    def admit(self, row: Row) -> None:
        """Add a row; `has_place` was asked.

        The known beginning of its prompt is reused: from the last text, then from the prefix cache. Nothing is
        computed. Raises: MemoryShortageError; the row is then not added.
        """
        index = len(self._rows)
        if index:
            self._begin_beside(row)
        else:
            start = self.reusable(row.known)
            self._session.expect(1, 2 * len(row.known))
            self._session.rewind(0, start)
            row.fed = start
        self._rows.append(row)
        if self._prefixes is not None:
            try:
                self._prefixes.restore(index, row.known)
            except EdgelmError:
                row.fed = self._session.length(index)
                self.drop(row)
                raise
            row.fed = self._session.length(index)
        row.reused = row.fed
        if row.lookup is not None:
            row.lookup.begin(row.known, self._free_drafts)

    def advance(self) -> Iterator[Event]:
        """One step: a token for each row whose prompt is fed, and a piece of one other prompt, or several short ones.

        Yields: a row with its next token, with None when it ended, or with the EdgelmError that ended it. Set `ended`
        before the next event to end a row. Raises: any other error; then call `abandon`.
        """
        for row in [row for row in self._rows if row.interrupted()]:
            self.drop(row)
            yield row, None
        if self._fed:
            yield from self._step()
        budget = self._pieces.budget(beside_rows=self._fed > 0)
        while budget > 0 and self._fed < len(self._rows):
            index = self._pieces.choose(self._rows, self._fed)
            row = self._rows[index]
            if row.fed == row.reused and not row.chosen:
                self._share(row)
            size = self._pieces.size(row, budget)
            budget -= self._pieces.cost(size)
            yield from self._feed_piece(index, size)

    def drop(self, row: Row) -> None:
        """End a row and keep what was computed for it. Does nothing for a row that was not admitted."""
        if row not in self._rows:
            return
        index = self._rows.index(row)
        self._take_back(index)
        held = row.known[: row.fed]
        if self._prefixes is not None:
            self._prefixes.keep(index, held)
        if len(self._rows) == 1:
            self._idle = held
        if index < self._fed:
            self._fed -= 1
            self._move(self._fed, index)
            index = self._fed
        self._move(len(self._rows) - 1, index)
        self._rows.pop()

    def abandon(self) -> None:
        """Forget all rows and what the session holds, after a step was broken off at an unknown point."""
        self._rows, self._fed, self._idle = [], 0, []
        self._session.expect(1, 0)
        self._session.rewind(0, 0)

    def _take_back(self, index: int) -> None:
        """Remove rejected draft tokens from the KV cache."""
        if self._session.length(index) > self._rows[index].fed:
            self._session.rewind(index, self._rows[index].fed)

    def _begin_beside(self, row: Row) -> None:
        """Prepare an empty row behind the others."""
        index, longest = len(self._rows), max(len(row.known), *(len(other.known) for other in self._rows))
        self._session.expect(index + 1, longest)
        self._session.rewind(index, 0)

    def _share(self, row: Row) -> None:
        """Before a row's prompt is fed: copy the beginning that another row holds of it, if that is longer."""
        others = [other for other in self._rows if other is not row]
        shared = [_common(row.known, other.known[: other.fed]) for other in others]
        if max(shared, default=0) > row.fed:
            row.fed = row.reused = max(shared)
            other = others[shared.index(row.fed)]
            self._session.copy(self._rows.index(other), self._rows.index(row), row.fed)

    def _move(self, source: int, target: int) -> None:
        """Move a row to the place of another one, which is no longer needed."""
        if source != target:
            self._rows[target] = self._rows[source]
            self._session.copy(source, target, self._session.length(source))

    def _swap(self, index: int, other: int) -> None:
        if index != other:
            self._rows[index], self._rows[other] = self._rows[other], self._rows[index]
            self._session.swap(index, other)

    def _step(self) -> Iterator[Event]:
        self._take_back(0)
        if self._fed == 1:
            yield from self._step_of_one(self._rows[0])
            return
        stepped = self._rows[: self._fed]
        try:
            logits = self._session.step([row.known[-1] for row in stepped])
        except MemoryShortageError as error:  # the others go on without the last one
            yield self._failed(stepped[-1], error)
            return
        except EdgelmError as error:
            for row in stepped:
                yield self._failed(row, error)
            return
        for row in stepped:
            row.fed += 1
        # From the last row to the first: a row that ends is replaced by one that was already handled.
        for index in reversed(range(len(stepped))):
            yield from self._take(index, logits[index : index + 1])

    def _step_of_one(self, row: Row) -> Iterator[Event]:
        """One step of one row, with draft tokens that the same step verifies. Several rows have none: each steps by one
        token."""
        drafts: list[int] = []
        if row.lookup is not None and len(self._rows) == 1:
            # The last token of an answer is never fed, so it needs no position; nor does a draft token in its place.
            drafts = row.lookup.draft(self._left(row) - 1)
        try:
            results = self._run(0, [row.known[-1], *drafts], 1 + len(drafts))
        except EdgelmError as error:
            yield self._failed(row, error)
            return
        row.fed += 1
        yield from self._take(0, results, drafts)

    def _left(self, row: Row) -> int:
        """How many tokens may be chosen before the row ends or its context is full."""
        left = row.max_tokens - row.chosen
        if row.keep is None or self._context is None:
            return left
        return min(left, self._context - len(row.known) + 1)

    def _feed_piece(self, index: int, size: int) -> Iterator[Event]:
        row = self._rows[index]
        piece = row.known[row.fed : row.fed + size]
        last = row.fed + len(piece) == len(row.known)
        started = time.perf_counter()
        try:
            results = self._run(index, piece, int(last))
        except EdgelmError as error:
            yield self._failed(row, error)
            return
        self._pieces.fed(len(piece), started)
        row.fed += len(piece)
        if last:
            self._swap(index, self._fed)
            self._fed += 1
            yield from self._take(self._fed - 1, results)

    def _run(self, index: int, token_ids: Sequence[int], keep: int) -> NDArray[Any]:
        """Logits (keep, vocab_size), or token ids (keep) that the session picked."""
        if self._picks is not None and self._rows[index].greedy:
            return self._picks.likeliest(token_ids, keep)
        return self._session.feed(index, token_ids, keep)

    def _take(self, index: int, results: NDArray[Any], drafts: Sequence[int] = ()) -> Iterator[Event]:
        """Choose the next token, and further ones as long as they equal the draft tokens. results: (1 + drafts, ...)"""
        row = self._rows[index]
        picked = results.ndim == 1
        for place, result in enumerate(results):
            try:
                token = int(result) if picked else row.chooser.choose(result)
            except EdgelmError as error:
                yield self._failed(row, error)
                return
            row.known.append(token)
            row.chosen += 1
            if row.lookup is not None:
                row.lookup.add(token)
            yield row, token
            if row.is_over():
                self.drop(row)
                yield row, None
                return
            if place == len(drafts) or drafts[place] != token:
                break
            row.fed += 1
        if row.keep is not None and self._context is not None and len(row.known) > self._context:
            self._slide(row)

    def _slide(self, row: Row) -> None:
        """Forget the older half of a row; the rest will be fed again."""
        index = self._rows.index(row)
        if self._prefixes is not None:
            self._prefixes.keep(index, row.known[: row.fed])
        row.shorten()
        self._session.rewind(index, row.fed)
        self._fed -= 1
        self._swap(index, self._fed)
        if row.lookup is not None:
            row.lookup.begin(row.known, self._free_drafts)

    def _failed(self, row: Row, error: EdgelmError) -> Event:
        self.drop(row)
        return row, error


def _common(token_ids: Sequence[int], held: Sequence[int]) -> int:
    """Length of the common prefix of two texts, at most one less than the first text."""
    limit = min(len(token_ids) - 1, len(held))
    return next((index for index in range(limit) if token_ids[index] != held[index]), limit)
