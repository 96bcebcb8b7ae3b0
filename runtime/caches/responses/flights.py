"""One computation for equal requests at the same time: the first one computes, the others wait for its answer."""

from __future__ import annotations

import threading

from ...host.forks import watch_forks
from .answers import CachedAnswer


class Flight:
    """A computation that runs, or ran."""

    def __init__(self) -> None:
        self._landed = threading.Event()
        self.answer: CachedAnswer | None = None

    def land(self, answer: CachedAnswer | None) -> None:
        """Wake those who wait, with the answer or without one. Only the first call counts; one thread makes them."""
        if not self._landed.is_set():
            self.answer = answer
            self._landed.set()

    def wait(self, timeout_s: float | None) -> bool:
        """Block until it landed, at most so long; whether it did. `answer` is None if it failed or was cancelled."""
        return self._landed.wait(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


class Flights:
    """The computations of this process by key.

    Atomic between threads (a lock held for dictionary work only). Nothing is shared between processes: two of them
    may compute the same answer at once, and store it twice. Cost: O(1). Raises: nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Flight] = {}
        watch_forks(self)

    def join(self, key: str) -> tuple[Flight, bool]:
        """The flight of a key, and whether the caller leads it: then it must `end` it."""
        with self._lock:
            running = self._running.get(key)
            if running is None:
                running = self._running[key] = Flight()
                return running, True
            return running, False

    def end(self, key: str, flight: Flight, answer: CachedAnswer | None) -> None:
        """Land a flight and forget it. Doing so again does nothing, also when the key has another flight by then."""
        with self._lock:
            if self._running.get(key) is flight:
                del self._running[key]
        flight.land(answer)

    def after_fork(self) -> None:
        """The leaders are not in the child."""
        self._lock = threading.Lock()
        self._running = {}
