"""What a forked child must not inherit: locks that a thread of the parent held, and open database connections."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object that replaces its locks and lets go of inherited connections in a child."""

    def after_fork(self) -> None:
        """Called in the child, before it runs anything else."""


_objects: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch_forks(item: Forkable) -> None:
    """Have `item.after_fork()` called in every child, for as long as the item lives."""
    _objects.add(item)


def _after_fork() -> None:
    for item in list(_objects):
        item.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
