"""Streams for asyncio: a worker thread computes, the event loop stays free. Import this module late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from .results import Chunk
from .turns import Caller


async def in_worker(
    start: Callable[[Caller], Generator[Chunk, None, None]], cancelled: threading.Event
) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream that is started for this task and computed in a thread of its own.

    A chunk is computed only when it is asked for. When the iteration ends early, by `aclose`, by leaving the loop or
    by cancelling the task, `cancelled` is set, and the thread closes the stream after the step that is running; nobody
    waits for that.
    """
    caller = Caller(task=asyncio.current_task())
    chunks = start(caller)
    loop, worker = asyncio.get_running_loop(), ThreadPoolExecutor(1, "edgelm")
    try:
        while (chunk := await loop.run_in_executor(worker, next, chunks, None)) is not None:
            yield chunk
    finally:
        caller.gone = True
        cancelled.set()
        worker.submit(chunks.close)
        worker.shutdown(wait=False)
