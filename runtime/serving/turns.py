"""Who may use an engine now: requests take turns, and a caller that would wait for itself is refused."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ..errors import EngineBusyError, EngineClosedError


@dataclass
class Caller:
    """Who asks: a thread, and a task of its event loop for asynchronous requests. `gone` once it waits for nothing."""

    thread: int = field(default_factory=threading.get_ident)
    task: object = None
    gone: bool = False

    def waits_for(self, holder: Caller) -> bool:
        """Whether waiting for the holder would never end, because it goes on only when this caller does.

        Tasks of one event loop may wait for each other; what blocks the thread of the loop blocks them all.
        """
        if holder.gone or holder.thread != self.thread:
            return False
        return self.task is None or holder.task is None or holder.task is self.task


class Turns:
    """One holder at a time, and an end after which there is none. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Caller | None = None
        self.closed = False

    def take(self, caller: Caller, timeout: float | None) -> bool:
        """Wait for the turn, at most `timeout` seconds. Returns whether it came.

        Raises: EngineBusyError where the caller would wait for itself, EngineClosedError.
        """
        self._refuse_waiting_for_itself(caller, "finish or close it first")
        if not self._lock.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)):
            return False
        if self.closed:
            self._lock.release()
            raise EngineClosedError("the engine was closed while this request waited: load the bundle again")
        self._holder = caller
        return True

    def release(self) -> None:
        """Let the next one have its turn."""
        self._holder = None
        self._lock.release()

    def close(self) -> None:
        """Wait for the turn and give no more. Raises: EngineBusyError."""
        self._refuse_waiting_for_itself(Caller(), "close the stream first")
        with self._lock:
            self.closed = True

    def waits_for_itself(self, caller: Caller) -> bool:
        """Whether waiting for the turn would never end, because its holder goes on only when this caller does."""
        holder = self._holder
        return holder is not None and caller.waits_for(holder)

    def _refuse_waiting_for_itself(self, caller: Caller, remedy: str) -> None:
        if self.waits_for_itself(caller):
            raise EngineBusyError(f"this thread still iterates over another stream of the engine: {remedy}")
