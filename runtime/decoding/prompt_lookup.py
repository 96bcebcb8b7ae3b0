"""Guessed tokens (prompt lookup decoding): what followed the same few tokens before is guessed to follow them again.

Owns what is guessed and when. Knows no session and no logits: `Sequencer.generate` checks guesses in the step that it
runs anyway and keeps those that it would have chosen itself, so an answer never depends on them, only its speed does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..sessions.protocol import MOST_GUESSES

# Where guesses keep failing, one wrong guess in so many steps is what looking for repetition costs.
_LONGEST_PAUSE = 63
# Lengths of n-grams, the surer ones first.
_SIZES = (3, 2)


class Lookup:
    """The guesses of one answer: `begin` with its prompt, `add` each token, `guess` before a step.

    guessed: tokens that were guessed; accepted: those of them that came. Not safe between threads.
    """

    def __init__(self) -> None:
        self.guessed = self.accepted = 0
        self._text = Text(())
        self._pace = Pace()
        self._open: list[int] = []
        self._hits = 0

    def begin(self, token_ids: Sequence[int], free: int = 0) -> None:
        """The text that guesses are taken from, also where it changes within an answer. How well guesses do is not
        forgotten. free: so many guesses cost nothing, because a step computes rows for them anyway."""
        self._text = Text(token_ids)
        self._pace.free = free
        self._open = []

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        self._text.add(token)
        if self._hits < len(self._open) and self._open[self._hits] == token:
            self._hits += 1
            self.accepted += 1

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next, often none. The last guesses are decided: they failed where they
        did not come."""
        if self._open:
            self._pace.learn(len(self._open), self._hits)
        count = min(most, self._pace.wanted())
        self._open = self._text.following(count) if count > 0 else []
        self._hits = 0
        self.guessed += len(self._open)
        return self._open


class Text:
    """A text that grows, where it repeats itself, and what followed there.

    Cost: 0.3 ms for 1,000 tokens when it is asked first, then some 2 µs each time; some 350 bytes a token.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids = list(token_ids)
        # From an n-gram of three or two tokens to the place behind the last time that it stood there; for all places in
        # front of `_indexed`. The n-gram at the text's end has no token behind it yet.
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        # The place whose token comes next if what was repeated so far goes on.
        self._source: int | None = None

    def add(self, token: int) -> None:
        """The text goes on."""
        if self._source is not None:
            self._source = self._source + 1 if self._ids[self._source] == token else None
        self._ids.append(token)

    def following(self, count: int) -> list[int]:
        """`count` tokens that follow if the text goes on repeating an earlier place, or none where it repeats none.

        The place is the one that it has been repeating, else where its last three or two tokens stood last. A place
        so near that fewer tokens follow it is taken to be repeated over and over.
        """
        if self._source is None:
            self._source = self._found()
        if self._source is None:
            return []
        period = len(self._ids) - self._source
        return [self._ids[self._source + step % period] for step in range(count)]

    def _found(self) -> int | None:
        self._index()
        for size in _SIZES:
            place = self._behind.get(tuple(self._ids[-size:]))
            if place is not None:
                return place
        return None

    def _index(self) -> None:
        """Note the n-grams that got a token behind them since the last time."""
        ids = self._ids
        for size in _SIZES:
            first = max(self._indexed, size)
            columns = [ids[first - size + column :] for column in range(size)]
            self._behind.update(zip(zip(*columns, strict=False), range(first, len(ids)), strict=False))
        self._indexed = len(ids)


class Pace:
    """How many tokens are worth guessing: twice as many where all came, as many as came where some did, and none for a
    while, longer each time, where none came.

    A guess that comes saves a step, one that fails costs 6 % of one on a short context and 30 % on a long one. On text
    without repetition the pauses keep that below 3 %; a single success ends them.
    """

    def __init__(self, free: int = 0) -> None:
        """free: guesses that cost nothing and are wanted always."""
        self.free = free
        self._length = 1
        self._pause = self._wait = 0

    def wanted(self) -> int:
        """How many to guess for the step that is next. Asked once for each step."""
        if self._wait:
            self._wait -= 1
            return self.free
        return self._length

    def learn(self, guessed: int, accepted: int) -> None:
        """What became of the guesses of a step, of which there was one at least."""
        if accepted:
            self._length = min(2 * guessed, MOST_GUESSES) if accepted == guessed else accepted
            self._pause = self._wait = 0
        elif guessed > self.free:
            self._length = 1
            self._pause = self._wait = min(2 * self._pause + 1, _LONGEST_PAUSE)
