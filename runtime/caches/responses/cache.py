"""The response cache that an engine asks: memory first, then a store that outlives the process, and one computation
for equal requests at once.

The key holds everything that can change the answer, so a hit is the answer that would be computed. Only finished
answers are stored. Whatever happens to the outer store, the engine goes on: it computes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ...errors import CacheError, SettingsError, shown
from ...host.clock import Clock
from ...host.forks import watch_forks
from ...host.home import home, own_folder
from ..budgets import default_budgets
from .answers import CachedAnswer, response_key
from .database import FOLDER_NAME, DiskBudget
from .flights import Flight, Flights
from .memory import MemoryStore
from .settings import ResponseCacheSettings
from .sqlite import SqliteStore
from .store import AnswerStore, StoreStats

__all__ = [
    "CachedAnswer",
    "Lookup",
    "ResponseCache",
    "ResponseCacheSettings",
    "default_folder",
    "open_response_cache",
    "response_key",
]

# How long a store that failed is not asked: a server that is gone would cost each request a second.
_REST_S = 60.0

log = logging.getLogger(__name__)

T = TypeVar("T")


class Lookup:
    """What `ResponseCache.look_up` found. `answer` is None where the caller is to compute and `keep` it."""

    def __init__(self, answer: CachedAnswer | None, keep: Callable[[CachedAnswer], None]) -> None:
        self.answer = answer
        self.keep = keep


class ResponseCache:
    """Answers in memory and, with an outer store, beyond this process.

    Atomic between threads: every method; the two stores are asked one after the other, which no caller can tell, since
    a key has one right answer only. Between processes: as the outer store (`SqliteStore`, `RedisStore`); without one
    nothing is shared. Raises: nothing but `check`; where the outer store fails, one warning is logged, it is left alone
    for a minute, and memory serves alone.
    """

    def __init__(
        self, memory: MemoryStore | None = None, outer: AnswerStore | None = None, *, clock: Clock | None = None
    ) -> None:
        """Both stores belong to this cache from here on. memory: None makes one with the default budgets."""
        self._memory, self._outer = memory or MemoryStore(), outer
        self._clock = clock or Clock()
        self._flights = Flights()
        self._warned: set[str] = set()
        self._rests_until = -float("inf")
        self._count = threading.Lock()
        self.hits = 0
        self.misses = 0
        watch_forks(self)

    def get(self, key: str) -> CachedAnswer | None:
        """The answer of a key or None; counts a hit or a miss. Cost: a dictionary's, or one read of the outer store."""
        answer = self._memory.get(key)
        if answer is not None:
            self._ask(lambda outer: outer.touch(key))
        else:
            answer = self._ask(lambda outer: outer.get(key))
            if answer is not None:
                self._memory.put(key, answer)
        with self._count:
            self.hits += answer is not None
            self.misses += answer is None
        return answer

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer in both. Cost: one write of the outer store."""
        self._memory.put(key, answer)
        self._ask(lambda outer: outer.put(key, answer))

    @contextlib.contextmanager
    def look_up(self, key: str, *, timeout_s: float | None = None) -> Iterator[Lookup]:
        """Find an answer, or lead its computation until the block ends or its `keep` was called.

        While another thread leads the same one, this blocks, at most so many seconds; it then has that answer, or leads
        itself if the other failed or was cancelled. timeout_s: 0 to look only, for a caller for whom that thread may be
        waiting. Raises: what the block raises.
        """
        deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
        flight, leads = self._flights.join(key)
        while not leads and flight.wait(None if deadline is None else max(0.0, deadline - self._clock.monotonic())):
            if flight.answer is not None:
                with self._count:
                    self.hits += 1
                yield Lookup(flight.answer, lambda _: None)
                return
            flight, leads = self._flights.join(key)
        if leads:
            yield from self._lead(key, flight)
        else:
            yield Lookup(self.get(key), lambda answer: self.put(key, answer))

    def clear(self) -> None:
        """Forget all answers, here and in the outer store; the counters stay."""
        self._memory.clear()
        self._ask(lambda outer: outer.clear())

    def stats(self) -> StoreStats:
        """Of the memory."""
        return self._memory.stats()

    def __len__(self) -> int:
        return self.stats().entries

    def check(self) -> None:
        """Raises: CacheError, if an invariant of a store does not hold. Cost: reads all entries."""
        self._memory.check()
        if self._outer is not None:
            self._outer.check()

    def close(self) -> None:
        """Write what waits to be written and free the outer store's file or connection. A later call opens it again."""
        self._ask(lambda outer: outer.close())

    def after_fork(self) -> None:
        """A thread that held the lock is not in the child."""
        self._count = threading.Lock()

    def _lead(self, key: str, flight: Flight) -> Iterator[Lookup]:
        def keep(answer: CachedAnswer) -> None:
            try:
                self.put(key, answer)
            finally:
                self._flights.end(key, flight, answer)

        try:
            found = self.get(key)
            if found is not None:
                self._flights.end(key, flight, found)
            yield Lookup(found, keep)
        finally:
            self._flights.end(key, flight, None)

    def _ask(self, operation: Callable[[AnswerStore], T]) -> T | None:
        """What the outer store says, or None where there is none, it rests, or it fails."""
        if self._outer is None or self._clock.monotonic() < self._rests_until:
            return None
        try:
            return operation(self._outer)
        except CacheError as error:
            self._rests_until = self._clock.monotonic() + _REST_S
            level = logging.DEBUG if str(error) in self._warned else logging.WARNING
            self._warned.add(str(error))
            log.log(level, "%s; answers are kept in memory only for now", error)
            return None


def default_folder() -> Path:
    """Where the database of answers is without another word: EDGELM_HOME/responses. Raises: CacheError."""
    return own_folder(home() / FOLDER_NAME)


def open_response_cache(wanted: bool | ResponseCacheSettings) -> ResponseCache | None:
    """The cache that `load` was asked for; None for False. No file is opened and no server is called before it is used.

    Raises: SettingsError, MissingExtraError.
    """
    if wanted is False:
        return None
    if wanted is not True and not isinstance(wanted, ResponseCacheSettings):
        raise SettingsError(f"response_cache must be True, False or ResponseCacheSettings, found {shown(wanted)}")
    settings = default_budgets().responses if wanted is True else wanted
    memory = MemoryStore(settings.memory_bytes, settings.memory_entries, ttl_s=settings.ttl_s, policy=settings.policy)
    return ResponseCache(memory, _outer_store(settings))


def _outer_store(settings: ResponseCacheSettings) -> AnswerStore | None:
    if settings.redis_url is not None:
        from .redis_store import RedisStore

        return RedisStore(settings.redis_url, ttl_s=settings.ttl_s)
    if not settings.disk:
        return None
    try:
        folder = default_folder() if settings.folder is None else Path(settings.folder).absolute()
    except CacheError as error:
        log.warning("%s; answers are kept in memory only", error)
        return None
    budget = DiskBudget(settings.disk_bytes, settings.disk_entries)
    return SqliteStore(folder, budget, ttl_s=settings.ttl_s, policy=settings.policy)
