"""Write blocks in the background: a thread that lives while there is something to write.

The thread is not a daemon, so an ending process still writes what waits. It ends when its queue is empty, so nobody has
to stop it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from typing import NamedTuple

from ...host.clock import Clock
from ...host.forks import watch_forks
from .files import BlockFiles
from .memory import Block

# How long a block counts as written, or its use as noted, before the disk is asked again.
_NOTED_S = 60.0
# Pauses between writes, as a multiple of a write's time: answers need the cores more.
_PAUSE = 4.0

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    key: bytes
    used: float
    block: Block | None

    @property
    def bytes(self) -> int:
        return 0 if self.block is None else self.block.nbytes


class BlockWriter:
    """Hands blocks to `BlockFiles`. Between threads: safe. Raises: nothing.

    The queue is bounded: if the disk is slower than the model, blocks are not written, the last ones of a text first.
    """

    def __init__(self, files: BlockFiles, max_waiting_bytes: int, clock: Clock | None = None) -> None:
        self._files, self._max_bytes, self._clock = files, max_waiting_bytes, clock or Clock()
        self._noted: OrderedDict[bytes, float] = OrderedDict()
        self._thread: threading.Thread | None
        self._reset()
        watch_forks(self)

    def wants(self, key: bytes) -> bool:
        """Whether to `add` the block of a key, to write it or to note its use, which is worth it once a minute. Then
        note the uses of all blocks before it too, or they would seem older."""
        return key not in self._noted

    def add(self, key: bytes, used: float, block: Block | None) -> None:
        """Queue a call of `BlockFiles.put`. Cost: that of a queue."""
        item = _Waiting(key, used, block)
        with self._lock:
            if self._bytes + item.bytes > self._max_bytes:
                return
            if block is not None:
                self._noted[key] = self._clock.monotonic()
            self._queue.append(item)
            self._bytes += item.bytes

    def start(self) -> None:
        """Begin to write what was added. Cost: starting a thread, unless it runs."""
        now = self._clock.monotonic()
        while self._noted and next(iter(self._noted.values())) <= now - _NOTED_S:
            self._noted.popitem(last=False)
        # A thread that is started while the interpreter ends never runs, and Python 3.11 would wait for it forever.
        with self._lock:
            if not self._queue or self._thread is not None or sys.is_finalizing():
                return
            self._thread = threading.Thread(target=self._work, name="edgelm-prefixes")
            try:
                self._thread.start()
            except RuntimeError as error:  # there are no more threads
                self._thread = None
                log.debug("blocks are not written: %s", error)

    def flush(self) -> None:
        """Wait until everything that was added is written."""
        self._hurry.set()
        self.start()
        thread = self._thread
        if thread is not None:
            thread.join()
        self._hurry.clear()

    def after_fork(self) -> None:
        """Start empty in the child: the thread exists only in the parent, which writes what waits."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._thread = None

    def _work(self) -> None:
        while (item := self._next()) is not None:
            started = time.perf_counter()
            self._files.put(item.key, item.used, item.block)
            if threading.main_thread().is_alive():  # else the process is ending
                self._hurry.wait(_PAUSE * (time.perf_counter() - started))

    def _next(self) -> _Waiting | None:
        with self._lock:
            if not self._queue:
                self._thread = None
                return None
            item = self._queue.popleft()
            self._bytes -= item.bytes
            return item
