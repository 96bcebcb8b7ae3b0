"""The response cache that an engine asks: memory first, then a store that outlives the process.

The key covers everything that can change the answer, so a hit is the answer that would be computed. Only finished
answers are stored. If the outer store (SQLite or Redis) fails, the engine computes instead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ...errors import CacheError, SettingsError, shown
from ...host.clock import Clock
from ...host.forks import watch_forks
from ...host.home import home, own_folder
from ..budgets import default_budgets
from .answers import CachedAnswer, response_key
from .database import FOLDER_NAME, DiskBudget
from .memory import MemoryStore
from .settings import ResponseCacheSettings
from .sqlite import SqliteStore
from .store import AnswerStore, StoreStats

__all__ = [
    "CachedAnswer",
    "ResponseCache",
    "ResponseCacheSettings",
    "default_folder",
    "open_response_cache",
    "response_key",
]

# How long to back off from a store that failed: an unreachable server would cost each request a second.
_REST_S = 60.0

log = logging.getLogger(__name__)

T = TypeVar("T")


class ResponseCache:
    """Answers in memory and, with an outer store, beyond this process.

    Atomic between threads: every method. The two stores are asked one after the other; no caller can tell, since a key
    has only one right answer. Between processes: as the outer store (`SqliteStore`, `RedisStore`); without one nothing
    is shared. Raises: nothing, except `check`. If the outer store fails, one warning is logged, and memory alone is
    used for a minute (backing off).
    """

    def __init__(
        self, memory: MemoryStore | None = None, outer: AnswerStore | None = None, *, clock: Clock | None = None
    ) -> None:
        """memory, outer: from now on used by this cache alone. memory: None makes one with the default budgets."""
        self._memory, self._outer = memory or MemoryStore(), outer
        self._clock = clock or Clock()
        self._warned: set[str] = set()
        self._rests_until = -float("inf")
        self._count = threading.Lock()
        self.hits = 0
        self.misses = 0
        watch_forks(self)

    def get(self, key: str) -> CachedAnswer | None:
        """The answer of a key or None; counts a hit or a miss. Cost: a dictionary lookup, or one read of the outer
        store."""
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

    def clear(self) -> None:
        """Forget all answers, here and in the outer store; the counters stay."""
        self._memory.clear()
        self._ask(lambda outer: outer.clear())

    def stats(self) -> StoreStats:
        """Figures of the memory."""
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
        """Make a new lock in a child: the thread that held the old one is not there."""
        self._count = threading.Lock()

    def _ask(self, operation: Callable[[AnswerStore], T]) -> T | None:
        """Return None if there is no outer store, if it is backing off after a failure, or if the call fails."""
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
    """The default folder of the database: EDGELM_HOME/responses. Raises: CacheError."""
    return own_folder(home() / FOLDER_NAME)


def open_response_cache(wanted: bool | ResponseCacheSettings) -> ResponseCache | None:
    """The cache that `load` was asked for; None for False. Files and servers are opened at the first use.

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
