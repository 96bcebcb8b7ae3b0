"""The thread that runs a scheduler's steps for callers of asyncio, who must not block."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable

from .listener import Listener

# Chunks that wait for a reader before nothing more is computed for it alone.
_READ_AHEAD = 32
# How long the thread waits for something to do before it ends.
_IDLE_S = 5.0

log = logging.getLogger(__name__)

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """Starts its thread when there is a reader, and ends it when there is none any more. Safe between threads."""

    def __init__(self, changed: threading.Condition, may_step: Callable[[], bool], step: Callable[[], None]) -> None:
        """changed: the scheduler's lock, notified of all that happens. may_step: called with the lock, takes the
        right to run a step if there is one to run. step: runs it, and tells listeners what it raises."""
        self._changed = changed
        self._may_step, self._step = may_step, step
        self._readers: list[Listener] = []
        self._thread: threading.Thread | None = None
        self._steps = self._stopped = False

    def serve(self, reader: Listener) -> None:
        """Compute for a listener until it has ended. The lock is held."""
        self._readers.append(reader)
        if self._thread is None:
            # A daemon: a stream that is left open does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="edgelm", daemon=True)
            self._thread.start()
            _workers.add(self)

    def stop(self) -> None:
        """Compute nothing more; waits for the step that is running."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            while self._steps:
                self._changed.wait()

    def forget(self) -> None:
        """In a forked child, which has no such thread."""
        _workers.discard(self)

    def _is_wanted(self) -> bool:
        self._readers = [reader for reader in self._readers if not reader.ended]
        return any(reader.whole or len(reader.chunks) < _READ_AHEAD for reader in self._readers)

    def _work(self) -> None:
        while self._waits_for_a_step():
            try:
                self._step()
            except Exception:
                # The listeners have it, and raise it where it is awaited.
                log.debug("a step failed", exc_info=True)
            with self._changed:
                self._steps = False
                self._changed.notify_all()

    def _waits_for_a_step(self) -> bool:
        """Whether there is one, which is this thread's to run then; not, where the thread is to end."""
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
    """onnxruntime must not compute while the interpreter takes itself apart."""
    for worker in list(_workers):
        worker.stop()


atexit.register(_rest_at_exit)
