"""Streams for asyncio: requests are made in a thread, steps run in the scheduler's worker, so the event loop stays
free.

Import this module late: asyncio costs a start-up 30 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from ..results import Chunk, Completion, Stats
from .answer import Request, completion
from .listener import Listener
from .scheduler import Scheduler


class ChunkStream(AsyncIterator[Chunk]):
    """The chunks of one answer. Nothing is computed before the first one is awaited.

    If the iteration ends early (by `aclose`, by cancelling the task, or by dropping the last reference, as when leaving
    the loop), the answer's row is free after the step that is running; nobody waits for that. This is no asynchronous
    generator, since the event loop would close one only some time after the loop over it was left.
    """

    def __init__(self, scheduler: Scheduler, make: Callable[[], Request], whole: bool = False) -> None:
        """make: makes the request; called in a thread, since tokenizing and compiling a grammar may take long. whole:
        as of `Listener`."""
        self._scheduler = scheduler
        self._make = make
        self._whole = whole
        self._listener: Listener | None = None
        self._left = False
        self._news = asyncio.Event()

    async def __anext__(self) -> Chunk:
        if self._left:
            raise StopAsyncIteration
        try:
            listener = self._listener or await self._ask()
            while True:
                self._news.clear()
                chunk = self._scheduler.ready(listener)
                if chunk is not None:
                    return chunk
                if listener.ended:
                    raise StopAsyncIteration
                await self._news.wait()
        except BaseException:  # any error, and cancelling the task above all, ends the computation
            self._leave()
            raise

    async def start(self) -> None:
        """Make the request and start computing it, as awaiting the first chunk does. Raises: as `Engine.generate`."""
        try:
            if self._listener is None:
                await self._ask()
        except BaseException:
            self._leave()
            raise

    @property
    def request(self) -> Request:
        """The request. A chunk must have been awaited before."""
        assert self._listener is not None, "a chunk was awaited"
        return self._listener.request

    @property
    def stats(self) -> Stats | None:
        """The figures so far, also of an answer that was cancelled; None before the first chunk was awaited."""
        return None if self._listener is None else self._listener.stats()

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that the model has read, and all of them; (0, 0) before those are known."""
        return (0, 0) if self._listener is None else self._listener.progress

    async def aclose(self) -> None:
        """Cancel what is left. Calling it again does nothing."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    async def _ask(self) -> Listener:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop is closed, so nobody waits
                loop.call_soon_threadsafe(self._news.set)

        def ask() -> Listener:
            # Set here: a task that is cancelled between this thread's return and its own next turn gets no result.
            self._listener = self._scheduler.submit(self._make(), whole=self._whole, wake=wake)
            if self._left:  # the task was cancelled meanwhile
                self._scheduler.cancel([self._listener])
            return self._listener

        return await loop.run_in_executor(None, ask)

    def _leave(self) -> None:
        self._left = True
        if self._listener is not None:
            self._scheduler.cancel([self._listener])


async def answer(scheduler: Scheduler, make: Callable[[], Request]) -> Completion:
    """A whole answer. Cancelling the task frees its row after the step that is running."""
    stream = ChunkStream(scheduler, make, whole=True)
    chunks = [chunk async for chunk in stream]
    return completion(stream.request.settings, chunks)


async def answer_batch(scheduler: Scheduler, make: Callable[[], Sequence[Request]], max_rows: int) -> list[Completion]:
    """The whole answers of several requests, at most `max_rows` at once; an error ends all."""
    requests = await asyncio.get_running_loop().run_in_executor(None, make)
    places = asyncio.Semaphore(max_rows)

    async def one(request: Request) -> Completion:
        async with places:
            return await answer(scheduler, lambda: request)

    tasks = [asyncio.create_task(one(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
