"""Waiting for a computation no longer than it is wanted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float | None, compute: Callable[[], T]) -> T | None:
    """What a function returns, or None where that takes longer. It then runs on in a thread that nothing waits for.

    seconds: None for as long as it takes. Raises: what the function raises in time.
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
