"""How far a piece of work is, and about how long it still takes: said from the first moment on, every few seconds.

Whoever runs a recipe says where the lines go (`telling`); whatever loops inside it wraps what it loops over (`tracked`)
and need not know of anyone who listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from ...runtime.bundle.figures import duration_text

_T = TypeVar("_T")
Say = Callable[[str], None]

EVERY_S = 5.0


@dataclass
class _Voice:
    """say: takes lines; busy: a loop has it, so that loops inside that one are silent."""

    say: Say
    busy: bool = False


_VOICE: ContextVar[_Voice | None] = ContextVar("edgelm_compress_voice", default=None)


@contextmanager
def telling(say: Say) -> Iterator[None]:
    """While the block runs, `tracked` says its lines to `say`."""
    token = _VOICE.set(_Voice(say))
    try:
        yield
    finally:
        _VOICE.reset(token)


def tracked(items: Collection[_T], what: str) -> Iterator[_T]:
    """The items one after another, with lines such as "3 of 8 windows read, about 4 s left".

    what: has been done with an item, in the plural. A loop inside another tracked loop says nothing of its own. Nothing
    is said where nobody listens.
    """
    voice = _VOICE.get()
    if voice is None or voice.busy:
        yield from items
        return
    clock = Clock(len(items))
    voice.busy = True
    try:
        for done, item in enumerate(items):
            line = clock.line(done)
            if line is not None:
                voice.say(f"{done} of {len(items)} {what}{line}")
            yield item
    finally:
        voice.busy = False


class Clock:
    """Knows when a line is due, and how long the rest takes if it goes on as it went so far."""

    def __init__(self, total: int, first: int = 0, guess_s: float | None = None) -> None:
        """total: pieces of work; first: of them that were done before; guess_s: what a piece may take, while none was
        done."""
        self._total, self._first, self._guess_s = total, first, guess_s
        self._started = time.monotonic()
        self._told: float | None = None

    def line(self, done: int) -> str | None:
        """ ", about 4 s left" where a line is due, "" where one is due and nothing is known yet, or None. Due are the
        first one, the one after the first piece, and then one every five seconds."""
        now = time.monotonic()
        soon = done == self._first + 1 or done == self._total
        if self._told is not None and not soon and now - self._told < EVERY_S:
            return None
        self._told = now
        piece = self._guess_s if done == self._first else (now - self._started) / (done - self._first)
        return "" if piece is None else f", about {duration_text(piece * (self._total - done))} left"
