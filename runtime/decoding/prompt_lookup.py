"""Prompt-lookup decoding: the tokens that followed the same few tokens before are proposed as draft tokens.

This file decides which draft tokens are tried, and when. It knows no session and no logits: `Decoder` verifies draft
tokens in a step that it runs anyway, and accepts those that it would have chosen itself. So an answer never depends
on draft tokens; only its speed does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..sessions.protocol import MOST_DRAFTS

# If draft tokens keep being rejected, one is tried every so many steps.
_LONGEST_PAUSE = 63
# Lengths of n-grams, the more reliable ones first.
_SIZES = (3, 2)


class Lookup:
    """The draft tokens of one answer: `begin` with its prompt, `add` each token, `draft` before a step.

    drafted: how many were tried; accepted: how many of them were chosen. Not safe between threads.
    """

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._text = Text(())
        self._pace = Pace()
        self._open: list[int] = []
        self._hits = 0

    def begin(self, token_ids: Sequence[int], free: int = 0) -> None:
        """Set the text that draft tokens are taken from, also when it changes within an answer; the counts stay. free:
        so many draft tokens cost nothing, because a step computes rows for them anyway."""
        self._text = Text(token_ids)
        self._pace.free = free
        self._open = []

    def add(self, token: int) -> None:
        """Append a token to the text."""
        self._text.add(token)
        if self._hits < len(self._open) and self._open[self._hits] == token:
            self._hits += 1
            self.accepted += 1

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next, often none. Draft tokens of the step before that were not added since
        count as rejected."""
        if self._open:
            self._pace.learn(len(self._open), self._hits)
        count = min(most, self._pace.wanted())
        self._open = self._text.following(count) if count > 0 else []
        self._hits = 0
        self.drafted += len(self._open)
        return self._open


class Text:
    """A growing text that finds where it repeats itself, and what followed there.

    Cost: 0.3 ms for 1,000 tokens at the first question, then some 2 µs each time; some 350 bytes a token.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids = list(token_ids)
        # From an n-gram of three or two tokens to the position behind its last occurrence, for all positions before
        # `_indexed`. The n-gram at the end of the text has no token behind it yet.
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        # The position of the next token, if the present repetition continues.
        self._source: int | None = None

    def add(self, token: int) -> None:
        """Append a token."""
        if self._source is not None:
            self._source = self._source + 1 if self._ids[self._source] == token else None
        self._ids.append(token)

    def following(self, count: int) -> list[int]:
        """The `count` tokens that follow if the text repeats an earlier passage; empty if it repeats none.

        The passage is the one that it has been repeating, else the last occurrence of its last three or two tokens. If
        that is so near that fewer than `count` tokens follow it, it is taken to repeat over and over.
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
        """Index the n-grams that have a token behind them since the last call."""
        ids = self._ids
        for size in _SIZES:
            first = max(self._indexed, size)
            columns = [ids[first - size + column :] for column in range(size)]
            self._behind.update(zip(zip(*columns, strict=False), range(first, len(ids)), strict=False))
        self._indexed = len(ids)


class Pace:
    """How many draft tokens to try: twice as many if all were accepted, as many as were accepted if some were. If none
    was accepted: none for a while, longer each time.

    An accepted token saves a step, a rejected one costs 6 % of one on a short context and 30 % on a long one. On text
    without repetition the pauses keep that below 3 %; a single success ends them.
    """

    def __init__(self, free: int = 0) -> None:
        """free: draft tokens that cost nothing and are always tried."""
        self.free = free
        self._length = 1
        self._pause = self._wait = 0

    def wanted(self) -> int:
        """How many to try in the next step. Asked once for each step."""
        if self._wait:
            self._wait -= 1
            return self.free
        return self._length

    def learn(self, drafted: int, accepted: int) -> None:
        """Note the result of a step that had at least one draft token."""
        if accepted:
            self._length = min(2 * drafted, MOST_DRAFTS) if accepted == drafted else accepted
            self._pause = self._wait = 0
        elif drafted > self.free:
            self._length = 1
            self._pause = self._wait = min(2 * self._pause + 1, _LONGEST_PAUSE)
