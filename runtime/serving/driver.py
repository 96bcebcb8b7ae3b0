"""Which thread runs the steps of a scheduler."""

from __future__ import annotations

import threading

from ..errors import EngineBusyError


class Driver:
    """A mutex that knows its owner. The scheduler's lock is held around every method."""

    def __init__(self) -> None:
        self._thread: int | None = None

    def take(self) -> bool:
        """Become the thread that runs steps, unless there is one."""
        if self._thread is not None:
            return False
        self._thread = threading.get_ident()
        return True

    def give_up(self) -> None:
        """Let another thread run steps."""
        self._thread = None

    def refuse_own(self) -> None:
        """Raises: EngineBusyError within a step, which would wait for itself: a callback of a template, a signal
        handler."""
        if self._thread == threading.get_ident():
            raise EngineBusyError("a step of this engine runs in this thread: wait until it has ended")
