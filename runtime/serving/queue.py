"""The requests that wait for a row, and which of them is next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .answer import unanswered
from .computation import Computation
from .listener import Listener

# A request that was overtaken so often is next, however long its prompt is.
_MOST_OVERTAKINGS = 4


class Queue:
    """Short prompts first, but a request is overtaken at most four times.

    It also knows all running and waiting computations by their request, so that an equal request shares one of them
    (single flight). Hold the scheduler's lock for every call.
    """

    def __init__(self) -> None:
        self._waiting: list[Computation] = []
        self._by_key: dict[str, Computation] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Computation]:
        """The waiting computations in order of arrival. They may be removed while iterating."""
        return iter(list(self._waiting))

    def join(self, listener: Listener, fresh: Computation) -> bool:
        """Let a listener share the computation of an equal request, or the fresh one. Returns: whether it is the fresh
        one, which the caller must then begin."""
        running = None if fresh.key is None else self._by_key.get(fresh.key)
        if running is None and fresh.key is not None:
            self._by_key[fresh.key] = fresh
        (running or fresh).join(listener)
        return running is None

    def forget(self, computation: Computation) -> None:
        """No longer share a computation with new listeners."""
        if computation.key is not None and self._by_key.get(computation.key) is computation:
            del self._by_key[computation.key]

    def append(self, computation: Computation) -> None:
        self._waiting.append(computation)

    def remove(self, computation: Computation) -> None:
        """Remove a computation, if it waits."""
        if computation in self._waiting:
            self._waiting.remove(computation)

    def take(self, has_place: Callable[[int], bool]) -> Computation | None:
        """Remove and return the next computation, if there is a place for its prompt. has_place: called with its number
        of tokens."""
        if not self._waiting:
            return None

        def order(computation: Computation) -> tuple[bool, int]:
            return computation.passed_over < _MOST_OVERTAKINGS, len(computation.row.known)

        chosen = min(self._waiting, key=order)
        if not has_place(len(chosen.row.known)):
            return None
        for earlier in self._waiting[: self._waiting.index(chosen)]:
            earlier.passed_over += 1
        self._waiting.remove(chosen)
        return chosen

    def drop_interrupted(self) -> None:
        """Give interrupted requests that have not begun an empty answer."""
        for computation in self:
            computation.drop_interrupted()
            if all(listener.request.interrupted() for listener in computation.listeners):
                self.remove(computation)
                self.forget(computation)
                for listener in computation.listeners:
                    listener.receive([unanswered(listener.request)])
