"""One caller's view of a computation: the chunks that wait for the caller, and how it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..host import machine
from ..results import Chunk, Stats
from .answer import Request


def nobody() -> None:
    """The `wake` of a caller that waits on the scheduler's condition, or does not wait."""


class Listener:
    """Chunks for one caller. Hold the scheduler's lock for every call except `stats`.

    whole: the caller takes all chunks in any case, as `Engine.generate` does. wake: called when something is new; it
    must not block. shared: the answer is computed for another caller's equal request.
    """

    def __init__(self, request: Request, *, whole: bool, wake: Callable[[], None] = nobody) -> None:
        self.request = request
        self.whole = whole
        self.shared = False
        self.chunks: deque[Chunk] = deque()
        self.error: BaseException | None = None
        self.ended = False
        self.reused = 0
        self.progress = (0, len(request.token_ids))
        self._wake = wake
        self._seen = 0
        self._generated = 0
        self._first = 0.0

    def receive(self, chunks: Sequence[Chunk]) -> None:
        """Take the new ones of an answer's chunks; the last chunk ends the listener. A cancelled listener gets
        nothing."""
        if self.ended:
            return
        for chunk in chunks[self._seen :]:
            self._seen += 1
            self._first = self._first or time.perf_counter()
            self._generated += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                self.ended = True
            self.chunks.append(replace(chunk, stats=self.stats()) if self.shared and self.ended else chunk)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """End: chunks that wait already are still delivered, then the error."""
        if not self.ended:
            self.ended, self.error = True, error
            self._wake()

    def expire(self) -> None:
        """End at the deadline while others continue: the answer ends as it is."""
        self.ended = True
        self.chunks.append(Chunk("", (), "deadline", self.stats()))
        self._wake()

    def cancel(self) -> None:
        """Drop the rest of the answer."""
        self.request.cancelled.set()
        self.chunks.clear()
        self.end()

    def stats(self) -> Stats:
        """The figures of the answer so far."""
        now = time.perf_counter()
        first = self._first or now
        several = self._generated > 1 and now > first and not self.shared
        return Stats(
            prompt_tokens=len(self.request.token_ids),
            reused_tokens=len(self.request.token_ids) if self.shared else self.reused,
            generated_tokens=self._generated,
            time_to_first_token_s=first - self.request.started,
            decode_tokens_per_s=(self._generated - 1) / (now - first) if several else 0.0,
            resident_bytes=machine.resident_bytes(),
            response_cache_hit=self.shared,
        )


def first_ready(listeners: Sequence[Listener]) -> tuple[Listener, Chunk] | None:
    """The next chunk of the first listener that has one. Raises: the error of a listener before it."""
    for listener in listeners:
        if listener.chunks:
            return listener, listener.chunks.popleft()
        if listener.error is not None:
            raise listener.error
    return None
