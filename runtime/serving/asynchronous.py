"""Streams for asyncio: a worker thread computes, the event loop stays free. Import this module late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from .turns import Caller

T = TypeVar("T")


class ChunkStream(AsyncIterator[T], Generic[T]):
    """The chunks of a stream, or what a batch gives, computed in a thread of its own, each only when it is asked for.

    Where the iteration ends early, by `aclose`, by cancelling the task or by dropping the last reference (leaving the
    loop), the thread closes the stream after the step that is running; nobody waits for that. No asynchronous
    generator, because the event loop would close one only some time after the loop over it was left.
    """

    def __init__(
        self, start: Callable[[Caller], Generator[T, None, None]], cancelled: Sequence[threading.Event]
    ) -> None:
        """start: makes the stream for a caller. cancelled: to be set to end its computations early."""
        self._cancelled = cancelled
        self._caller = Caller()
        self._chunks = start(self._caller)
        self._worker: ThreadPoolExecutor | None = None

    async def __anext__(self) -> T:
        if self._caller.gone:
            raise StopAsyncIteration
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "edgelm")
        self._caller.thread, self._caller.task = threading.get_ident(), asyncio.current_task()
        try:
            chunk = await asyncio.get_running_loop().run_in_executor(self._worker, next, self._chunks, None)
        except BaseException:  # whatever ends the iteration, a cancelled task first of all, ends the computation
            self._leave()
            raise
        if chunk is None:
            self._leave()
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the computation. Calling it again does nothing."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._caller.gone = True
        for event in self._cancelled:
            event.set()
        if self._worker is not None:
            with suppress(RuntimeError):  # the interpreter is ending, and the stream with it
                self._worker.submit(self._chunks.close)
            self._worker.shutdown(wait=False)
            self._worker = None
