"""Decides which thread runs the steps of a scheduler."""

from __future__ import annotations

import threading

from ..errors import EngineBusyError


class Driver:
    """A mutex that knows its owner thread. Hold the scheduler's lock for every call."""

    def __init__(self) -> None:
        self._thread: int | None = None

    def take(self) -> bool:
        """Try to become the thread that runs steps. Returns whether it worked."""
        if self._thread is not None:
            return False
        self._thread = threading.get_ident()
        return True

    def give_up(self) -> None:
        """Let another thread run steps."""
        self._thread = None

    def refuse_own(self) -> None:
        """Raises: EngineBusyError, if this thread runs a step already (called from a signal handler, for instance): it
        would wait for itself."""
        if self._thread == threading.get_ident():
            raise EngineBusyError("a step of this engine runs in this thread: wait until it has ended")
