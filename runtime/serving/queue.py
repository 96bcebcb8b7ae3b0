"""The requests of a scheduler that wait for a row, and which of them is next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .answer import unanswered
from .computation import Computation
from .listener import Listener

# A request that others overtook so often is admitted next, however long its prompt is.
_MOST_OVERTAKINGS = 4


class Queue:
    """Short prompts come first, but a request is overtaken four times at most.

    It also knows all computations that run or wait by the request that they answer, so that an equal request shares
    one of them (single flight). Not safe between threads: the scheduler's lock is held around every method.
    """

    def __init__(self) -> None:
        self._waiting: list[Computation] = []
        self._by_key: dict[str, Computation] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Computation]:
        """Those that wait, in the order in which they came. Safe to remove from while iterating."""
        return iter(list(self._waiting))

    def join(self, listener: Listener, fresh: Computation) -> bool:
        """Share the computation of the same request, or a fresh one. Returns: whether it is the fresh one, which is to
        be begun."""
        running = None if fresh.key is None else self._by_key.get(fresh.key)
        if running is None and fresh.key is not None:
            self._by_key[fresh.key] = fresh
        (running or fresh).join(listener)
        return running is None

    def forget(self, computation: Computation) -> None:
        """Let nobody share it any more."""
        if computation.key is not None and self._by_key.get(computation.key) is computation:
            del self._by_key[computation.key]

    def append(self, computation: Computation) -> None:
        self._waiting.append(computation)

    def remove(self, computation: Computation) -> None:
        """Take it out, if it waits."""
        if computation in self._waiting:
            self._waiting.remove(computation)

    def take(self, has_place: Callable[[int], bool]) -> Computation | None:
        """The next one, if there is a place for its prompt. has_place: asked with the prompt's number of tokens."""
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
        """Answer those that were interrupted before they began, with nothing."""
        for computation in self:
            computation.drop_interrupted()
            if all(listener.request.interrupted() for listener in computation.listeners):
                self.remove(computation)
                self.forget(computation)
                for listener in computation.listeners:
                    listener.receive([unanswered(listener.request)])
