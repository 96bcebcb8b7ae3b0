"""The chunks of one answer as its caller iterates over them."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from ..results import Chunk, Stats
from .answer import Request
from .listener import Listener
from .scheduler import Scheduler


class Stream(Iterator[Chunk]):
    """The chunks of an answer, computed on demand. Any thread may close it, also while another iterates.

    Closing it, leaving the loop and dropping the last reference cancel the answer: its row is free again after the step
    that is running. In a `with` block it is closed at the end.
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self._scheduler = scheduler
        self._request = request
        self._listener: Listener | None = None
        self._closed = False

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        if self._listener is None:
            self._listener = self._scheduler.submit(self._request)
            if self._closed:  # by another thread, before the listener was set
                self._scheduler.cancel([self._listener])
        try:
            found = self._scheduler.next([self._listener])
        except BaseException:
            self.close()
            raise
        if found is None:
            raise StopIteration
        return found[1]

    @property
    def stats(self) -> Stats | None:
        """The figures so far, also of an answer that was cancelled; None before the first chunk was asked for."""
        return None if self._listener is None else self._listener.stats()

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that the model has read, and all of them."""
        return (0, len(self._request.token_ids)) if self._listener is None else self._listener.progress

    def close(self) -> None:
        """Cancel the rest of the answer. Calling it again does nothing."""
        self._closed = True
        if self._listener is not None:
            self._scheduler.cancel([self._listener])

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
