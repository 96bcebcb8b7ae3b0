"""Progress of a long step: share done and estimated remaining time, reported every few seconds.

The code that runs a recipe sets the receiver of the lines (`telling`). A loop inside a step wraps its items in
`tracked` and does not know the receiver.
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
    """say: receives lines; busy: a tracked loop is running, so loops inside it report nothing."""

    say: Say
    busy: bool = False


_VOICE: ContextVar[_Voice | None] = ContextVar("edgelm_compress_voice", default=None)


@contextmanager
def telling(say: Say) -> Iterator[None]:
    """While the block runs, `tracked` sends its lines to `say`."""
    token = _VOICE.set(_Voice(say))
    try:
        yield
    finally:
        _VOICE.reset(token)


def tracked(items: Collection[_T], what: str) -> Iterator[_T]:
    """Yield the items and report lines such as "3 of 8 windows read, about 4 s left".

    what: what is done with the items, such as "windows read". Reports nothing inside another tracked loop or outside
    of `telling`.
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
    """Decides when a progress line is due, and extrapolates the remaining time."""

    def __init__(self, total: int, first: int = 0, guess_s: float | None = None) -> None:
        """total: pieces of work; first: pieces done before the start; guess_s: estimated seconds a piece, used until
        the first one is done."""
        self._total, self._first, self._guess_s = total, first, guess_s
        self._started = time.monotonic()
        self._told: float | None = None

    def line(self, done: int) -> str | None:
        """End of the progress line: ", about 4 s left", or "" without an estimate. None if no line is due.

        A line is due at the first call, after the first and the last piece, and every five seconds.
        """
        now = time.monotonic()
        soon = done == self._first + 1 or done == self._total
        if self._told is not None and not soon and now - self._told < EVERY_S:
            return None
        self._told = now
        piece = self._guess_s if done == self._first else (now - self._started) / (done - self._first)
        return "" if piece is None else f", about {duration_text(piece * (self._total - done))} left"
