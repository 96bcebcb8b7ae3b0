"""The thread that runs a scheduler's steps for callers from asyncio, who must not block."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable

from .listener import Listener

# Chunks that may wait for a reader; then nothing more is computed for it alone.
_READ_AHEAD = 32
# The thread ends after so much time without work.
_IDLE_S = 5.0

log = logging.getLogger(__name__)

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """Runs a thread while there are readers. Safe between threads."""

    def __init__(self, changed: threading.Condition, may_step: Callable[[], bool], step: Callable[[], None]) -> None:
        """changed: the scheduler's condition, notified of every change. may_step: called with its lock; becomes the
        driver if there is a step to run. step: runs it; its errors go to the listeners."""
        self._changed = changed
        self._may_step, self._step = may_step, step
        self._readers: list[Listener] = []
        self._thread: threading.Thread | None = None
        self._steps = self._stopped = False

    def serve(self, reader: Listener) -> None:
        """Compute for a listener until it has ended. Hold the lock."""
        self._readers.append(reader)
        if self._thread is None:
            # A daemon, so that an open stream does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="edgelm", daemon=True)
            self._thread.start()
            _workers.add(self)

    def stop(self) -> None:
        """Stop, after the step that is running."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            while self._steps:
                self._changed.wait()

    def forget(self) -> None:
        """Called in a forked child, which does not have the thread."""
        _workers.discard(self)

    def _is_wanted(self) -> bool:
        self._readers = [reader for reader in self._readers if not reader.ended]
        return any(reader.whole or len(reader.chunks) < _READ_AHEAD for reader in self._readers)

    def _work(self) -> None:
        while self._waits_for_a_step():
            try:
                self._step()
            except Exception:
                # The listeners got the error, and raise it to their callers.
                log.debug("a step failed", exc_info=True)
            with self._changed:
                self._steps = False
                self._changed.notify_all()

    def _waits_for_a_step(self) -> bool:
        """Wait until this thread is the driver and has a step to run. Returns False if the thread should end."""
        with self._changed:
            while not self._stopped:
                wanted = self._is_wanted()
                if wanted and self._may_step():
                    self._steps = True
                    return True
                if not self._changed.wait(_IDLE_S) and not wanted and not self._is_wanted():
                    break
            self._thread = None
            return False


def _rest_at_exit() -> None:
    """Stop all workers: onnxruntime must not compute while the interpreter shuts down."""
    for worker in list(_workers):
        worker.stop()


atexit.register(_rest_at_exit)
