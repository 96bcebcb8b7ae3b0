"""Token ids to token ids: feed a prompt in pieces, then choose a token and feed it, until told to stop.

Knows no text, no files and no onnxruntime: it works on any `Session`, and is tested on a fake one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..sessions.protocol import Session, best_piece, least_rows
from .prompt_lookup import Lookup
from .sampling import require_numbers


class Chooser(Protocol):
    """Chooses tokens from logits. It is asked once for each token of an answer, in their order, so it may remember."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. logits: (vocab_size) float32, valid during the call, not to be changed."""


class Greedy:
    """Chooses the most likely token, the lowest id among equals."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Raises: SessionError for logits that are NaN or infinite."""
        best = int(logits.argmax())
        require_numbers(logits[best])
        return best


@runtime_checkable
class PicksTokens(Protocol):
    """A session that can choose the most likely tokens itself, where its logits are."""

    def likeliest(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.int64]:
        """Append tokens as `Session.step` does. Returns: (keep) ids, the most likely one behind each of the last
        `keep` tokens, the lowest among equals. 0 <= keep <= len(token_ids)."""


def never() -> bool:
    """An answer that nothing interrupts."""
    return False


def shortened(token_ids: Sequence[int], keep: int) -> list[int]:
    """The ids without the older half of those that follow the first `keep`; at least two must follow them."""
    dropped = (len(token_ids) - keep) // 2
    return [*token_ids[:keep], *token_ids[keep + dropped :]]


class Prefixes(Protocol):
    """Where beginnings of texts are found that a session does not hold, and kept."""

    def restore(self, token_ids: Sequence[int], length: int) -> None:
        """Lengthen what the session holds, the first `length` of these tokens, by what is known, less one."""

    def keep(self, token_ids: Sequence[int]) -> None:
        """Store what the session holds, which are these tokens."""


class Sequencer:
    """A session and the token ids that are in its cache, so that a new prompt runs only what is new.

    Reuse is exact: with the default scheme, logits are bit for bit those of a cold run, wherever the text was cut.
    Not safe between threads.
    """

    def __init__(self, session: Session, piece_tokens: int | None = None, prefixes: Prefixes | None = None) -> None:
        """piece_tokens: of a prompt, fed at once, None for `best_piece`; prefixes: where beginnings of texts are found
        that `session` does not hold any more; its own."""
        self._session = session
        self._piece_tokens = piece_tokens or best_piece(session)
        self._prefixes = prefixes
        self._cached: list[int] = []
        self._unkept = False

    def reusable(self, token_ids: Sequence[int]) -> int:
        """How many tokens of this prompt are in the cache: the longest common prefix, less than the whole prompt,
        since the last token must run to give logits."""
        limit = min(len(self._cached), len(token_ids) - 1)
        for index in range(limit):
            if self._cached[index] != token_ids[index]:
                limit = index
                break
        return limit if limit > 0 and self._session.can_rewind(limit) else 0

    def reuse(self, token_ids: Sequence[int]) -> int:
        """Bring the cache to hold the longest known beginning of a prompt, its own or one of the prefix cache, and
        nothing else; how many tokens that is, less than the whole prompt."""
        start = self.reusable(token_ids)
        if start < len(self._cached):
            self._keep()
        self._session.rewind(start)
        del self._cached[start:]
        if self._prefixes is not None:
            try:
                self._prefixes.restore(token_ids, start)
            finally:  # whatever it came to, the session holds a beginning of this prompt
                self._cached = list(token_ids[: self._session.length])
        return len(self._cached)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """A request: at its end, whatever it ends of, what the cache holds is stored in the prefix cache."""
        try:
            yield
        finally:
            self._keep()

    def feed(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Bring the cache to hold exactly `token_ids`, reusing what it holds, piece by piece.

        Yields: for each piece the logits that it computed: of the prompt's last token (1, vocab_size), before it none
        (0, vocab_size). Stop iterating to cancel: what ran stays in the cache and can be reused.
        """
        return self._feed(token_ids, False)

    def generate(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        chooser: Chooser,
        stop_ids: Collection[int],
        interrupted: Callable[[], bool] = never,
        *,
        lookup: Lookup | None = None,
    ) -> Iterator[int]:
        """Token ids that follow a prompt.

        Ends after `max_tokens`, or after a token of `stop_ids`, which is yielded as the last one so that the caller
        can tell the two ends apart, or between two tokens once `interrupted()`.
        lookup: guess tokens and check several in one step. The tokens are those of a run without it where the session
        gives the same logits for a token alone as among others (`Manifest.exact_under_cuts`), whatever the chooser; the
        chooser is asked for the same rows in the same order.
        """
        picks = type(chooser) is Greedy and isinstance(self._session, PicksTokens)
        # With its answer and what may be asked next. A cache that moves while it is full is in memory twice.
        self._session.expect(2 * len(token_ids))
        rows: NDArray[Any] = np.empty(0)
        for rows in self._feed(token_ids, picks):  # noqa: B007, the last ones count
            if interrupted():
                return
        if lookup is not None:
            lookup.begin(token_ids, least_rows(self._session) - 1)
        guesses: list[int] = []
        for left in range(max_tokens - 1, -1, -1):
            token = int(rows[0]) if picks else chooser.choose(rows[0])
            if lookup is not None:
                lookup.add(token)
            yield token
            if token in stop_ids or not left or interrupted():
                return
            if guesses and guesses[0] == token:
                guesses, rows = guesses[1:], rows[1:]
                continue
            self._forget(len(guesses))
            # The last token that is chosen needs no place, so that guesses stay within the context as answers do.
            guesses = lookup.guess(left - 1) if lookup is not None else []
            rows = self._append([token, *guesses], 1 + len(guesses), picks)

    def generate_sliding(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        chooser: Chooser,
        stop_ids: Collection[int],
        interrupted: Callable[[], bool],
        *,
        context_length: int,
        keep: int,
        lookup: Lookup | None = None,
    ) -> Iterator[int]:
        """As `generate`, but where the context is full, the older half of what follows the first `keep` tokens is
        forgotten and what remains is fed again: what follows is exactly what follows those tokens in a fresh run.

        The prompt fits into the context, and keep < context_length; both are the caller's to hold.
        """
        known, left = list(token_ids), max_tokens
        while left:
            room = min(left, context_length - len(known) + 1)
            for token in self.generate(tuple(known), room, chooser, stop_ids, interrupted, lookup=lookup):
                known.append(token)
                left -= 1
                yield token
            if len(known) <= context_length or known[-1] in stop_ids:
                return
            known = shortened(known, keep)

    def greedy(self, token_ids: Sequence[int], max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        """`generate` with the most likely token each time."""
        return self.generate(token_ids, max_tokens, Greedy(), stop_ids)

    def _feed(self, token_ids: Sequence[int], picks: bool) -> Iterator[NDArray[Any]]:
        """As `feed`; with `picks` the last token's most likely successor in place of its logits."""
        for begin in range(self.reuse(token_ids), len(token_ids), self._piece_tokens):
            end = begin + self._piece_tokens
            yield self._append(token_ids[begin:end], int(end >= len(token_ids)), picks)

    def _keep(self) -> None:
        """Costs a copy of what is new, so it is not done between steps."""
        if self._prefixes is not None and self._unkept:
            self._prefixes.keep(self._cached)
            self._unkept = False

    def _append(self, token_ids: Sequence[int], keep: int, picks: bool) -> NDArray[Any]:
        """Rows of logits, or ids that the session chose."""
        # A step that fails or is interrupted leaves the session at its old length; the record follows only after it.
        if picks:
            assert isinstance(self._session, PicksTokens), "asked before"
            rows: NDArray[Any] = self._session.likeliest(token_ids, keep)
        else:
            rows = self._session.step(token_ids, keep)
        self._cached.extend(token_ids)
        self._unkept = True
        return rows

    def _forget(self, count: int) -> None:
        """Take back the last tokens of the cache: guesses that did not come. An answer that ends early leaves them
        there, recorded as what they are."""
        if count:
            self._session.rewind(len(self._cached) - count)
            del self._cached[-count:]
