"""One text after another: a `Decoder` of one row, for code that has a session to itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ..errors import EdgelmError
from ..sessions.protocol import Session
from .decoder import Decoder, Prefixes
from .row import Greedy, Row


class Sequencer:
    """Decodes one text at a time. A prompt that begins like the last text runs only its new part. Not safe between
    threads."""

    def __init__(
        self,
        session: Session,
        piece_tokens: int | None = None,
        prefixes: Prefixes | None = None,
        context_length: int | None = None,
    ) -> None:
        """As of `Decoder`."""
        self._decoder = Decoder(session, context_length, prefixes=prefixes, piece_tokens=piece_tokens)

    def reusable(self, token_ids: Sequence[int]) -> int:
        """As `Decoder.reusable`."""
        return self._decoder.reusable(token_ids)

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Make the session hold the longest known beginning of a prompt, its own or the prefix cache's, and nothing
        else. Returns its number of tokens, less than the whole prompt."""
        row = Row(token_ids, 1, Greedy())
        self._decoder.admit(row)
        self._decoder.drop(row)
        return row.reused

    def tokens(self, row: Row) -> Iterator[int]:
        """The tokens of a row as they come. Raises: SessionError, and what its chooser raises.

        Stop iterating to cancel: what was computed stays in the session and can be reused.
        """
        self._decoder.admit(row)
        try:
            while row in self._decoder.rows:
                for _, event in self._decoder.advance():
                    if isinstance(event, EdgelmError):
                        raise event
                    if event is not None:
                        yield event
        finally:
            self._decoder.drop(row)

    def greedy(self, token_ids: Sequence[int], max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        """The most likely token each time, up to `max_tokens`, or to one of `stop_ids`, which is yielded too."""
        return self.tokens(Row(token_ids, max_tokens, Greedy(), stop_ids))
