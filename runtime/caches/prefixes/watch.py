"""Detect that a file was overwritten after the model was loaded from it.

Replacing a file by a rename is harmless: the mapped file stays as it was. Writing into it changes the weights of the
running model, and results from then on must not be stored under the digest that was checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class Watch:
    """Remembers files as they are when this is made."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._before = {path: _state(path) for path in paths}

    def written(self) -> Path | None:
        """The first file that was written in place since, or None. Cost: a few microseconds a file."""
        for path, before in self._before.items():
            now = _state(path)
            if before is not None and now is not None and now != before and now[0] == before[0]:
                return path
        return None


def _state(path: Path) -> tuple[tuple[int, int], int, int] | None:
    """Device and inode, size, and modification time in nanoseconds; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns
