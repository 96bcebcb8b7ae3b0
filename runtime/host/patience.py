"""A time limit for a computation that cannot be interrupted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float | None, compute: Callable[[], T]) -> T | None:
    """The result of a function, or None after a time limit. The function then continues in a thread that nobody waits
    for.

    seconds: None for no limit. Raises: what the function raises in time.
    """
    if seconds is None:
        return compute()
    found: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            found.put((compute(), None))
        except BaseException as error:  # noqa: BLE001, handed over as it is
            found.put((None, error))

    threading.Thread(target=work, name="edgelm-encode", daemon=True).start()
    try:
        value, error = found.get(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))
    except queue.Empty:
        return None
    if error is not None:
        raise error
    return value
