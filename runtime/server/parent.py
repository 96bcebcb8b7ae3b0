"""Detect the end of the program that started this one: the pipe on standard input closes when it dies."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Callable

_STANDARD_INPUT = 0
_CHUNK_BYTES = 4096


def when_the_pipe_closes(call: Callable[[], object]) -> bool:
    """Call a function, in a thread of its own, when standard input ends. Input before that is ignored.

    Returns: whether standard input is a pipe (or a socket, which Node calls one). A terminal, a file and /dev/null are
    ignored: their end says nothing about the parent.
    """
    if sys.stdin is None:  # it was closed at the start, and another file may have its descriptor now
        return False
    mode = os.fstat(_STANDARD_INPUT).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return False

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(_STANDARD_INPUT, _CHUNK_BYTES):
                pass
        with contextlib.suppress(RuntimeError):  # the event loop has ended already
            call()

    threading.Thread(target=wait, name="edgelm-parent", daemon=True).start()
    return True
