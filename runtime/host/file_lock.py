"""A lock between processes that the system releases when its process dies for any reason."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PAUSE_S = 0.01


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a file. The file is created with mode 0600 and stays.

    Not reentrant: a thread that holds the lock would wait for itself. Raises: OSError, if the file cannot be created or
    locked; TimeoutError after `timeout_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} was locked by another process for {timeout_s:g} s")
            time.sleep(_PAUSE_S)
        yield
    finally:
        _free(descriptor)


@contextlib.contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Try to hold the lock, without waiting. Yields: whether it is held. Raises: OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _try_lock(descriptor)
    finally:
        _free(descriptor)


def _free(descriptor: int) -> None:
    """Release a lock. Closing alone is not enough: a child that was forked meanwhile has the descriptor too, and
    Windows would release the lock only some time later."""
    try:
        if sys.platform == "win32":
            import msvcrt

            with contextlib.suppress(PermissionError):  # it was not held
                msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows raises the latter
        return False
    return True
