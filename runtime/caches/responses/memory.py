"""Answers in this process's memory, within two budgets. The least recently or least often used are evicted first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from ...errors import CacheCorruptError
from ...host.clock import Clock
from ...host.forks import watch_forks
from .answers import CachedAnswer
from .store import Policy, StoreStats

DEFAULT_MEMORY_BYTES = 16 * 2**20
DEFAULT_MEMORY_ENTRIES = 10_000


class _Order(Protocol):
    """Which key to evict next. Keys are added once, used often, removed once."""

    def add(self, key: str) -> None: ...
    def use(self, key: str) -> None: ...
    def remove(self, key: str) -> None: ...
    def victim(self) -> str: ...


class _Recency:
    """The least recently used key first. Every method is O(1)."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def add(self, key: str) -> None:
        self._keys[key] = None

    def use(self, key: str) -> None:
        self._keys.move_to_end(key)

    def remove(self, key: str) -> None:
        del self._keys[key]

    def victim(self) -> str:
        return next(iter(self._keys))


class _Frequency:
    """The least often used key first, among equals the least recently used. O(1); `victim` is O(distinct counts)."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}
        self._keys: dict[int, OrderedDict[str, None]] = {}

    def add(self, key: str) -> None:
        self._set(key, 1)

    def use(self, key: str) -> None:
        uses = self._uses[key]
        self.remove(key)
        self._set(key, uses + 1)

    def remove(self, key: str) -> None:
        uses = self._uses.pop(key)
        del self._keys[uses][key]
        if not self._keys[uses]:
            del self._keys[uses]

    def victim(self) -> str:
        return next(iter(self._keys[min(self._keys)]))

    def _set(self, key: str, uses: int) -> None:
        self._uses[key] = uses
        self._keys.setdefault(uses, OrderedDict())[key] = None


_ORDERS: dict[Policy, type[_Recency] | type[_Frequency]] = {"lru": _Recency, "lfu": _Frequency}


@dataclass(frozen=True)
class _Entry:
    answer: CachedAnswer
    deadline: float  # by the monotonic clock, which cannot be set back


class MemoryStore:
    """Answers within a budget of estimated bytes and one of entries.

    Atomic: every method, under one lock that is held only for dictionary operations. Between threads: safe. Between
    processes: nothing is shared; a forked child starts empty. Cost: O(1), `put` O(evicted). Raises: nothing, except
    `check`.
    """

    def __init__(
        self,
        max_bytes: int = DEFAULT_MEMORY_BYTES,
        max_entries: int = DEFAULT_MEMORY_ENTRIES,
        *,
        ttl_s: float | None = None,
        policy: Policy = "lru",
        clock: Clock | None = None,
    ) -> None:
        """ttl_s: seconds that an answer lives, counted from when it was computed; None: for ever."""
        self._max_bytes, self._max_entries = max_bytes, max_entries
        self._ttl_s, self._policy, self._clock = ttl_s, policy, clock or Clock()
        self._lock = threading.Lock()
        self._forget()
        watch_forks(self)

    def get(self, key: str) -> CachedAnswer | None:
        """The answer, which counts as used, or None. An expired one is dropped."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if self._expired(entry):
                self._drop(key)
                return None
            self._order.use(key)
            return entry.answer

    def touch(self, key: str) -> None:
        """Count a use, if the answer is here."""
        self.get(key)

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer, evicting others first. The old one under this key is removed in any case, also if the new
        one is not stored because it is expired or larger than the budget."""
        with self._lock:
            self._drop(key)
            size, now = answer.size(), self._clock.wall()
            if size > self._max_bytes or self._max_entries < 1 or answer.expired(self._ttl_s, now):
                return
            while self._bytes + size > self._max_bytes or len(self._entries) >= self._max_entries:
                self._drop(self._order.victim())
            left = float("inf") if self._ttl_s is None else self._ttl_s - max(0.0, now - answer.created)
            self._entries[key] = _Entry(answer, self._clock.monotonic() + left)
            self._order.add(key)
            self._bytes += size

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._forget()

    def stats(self) -> StoreStats:
        """Entries and estimated bytes, including expired answers that nobody asked for since."""
        with self._lock:
            return StoreStats(len(self._entries), self._bytes, self._max_entries, self._max_bytes)

    def check(self) -> None:
        """Raises: CacheCorruptError, if the books do not match or a budget is exceeded. Cost: O(entries)."""
        with self._lock:
            total = sum(entry.answer.size() for entry in self._entries.values())
            if self._bytes != total or not 0 <= total <= self._max_bytes:
                raise CacheCorruptError(
                    f"{total} bytes in memory, {self._bytes} in the books, at most {self._max_bytes}"
                )
            if len(self._entries) > self._max_entries:
                raise CacheCorruptError(f"{len(self._entries)} entries in memory, at most {self._max_entries}")

    def close(self) -> None:
        """There is nothing to free."""

    def after_fork(self) -> None:
        """Start empty in a child: the thread that held the lock may have been in the middle of a change."""
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._order: _Order = _ORDERS[self._policy]()
        self._bytes = 0

    def _expired(self, entry: _Entry) -> bool:
        # Check the wall clock too: the monotonic one stands still while a laptop sleeps.
        return self._clock.monotonic() >= entry.deadline or entry.answer.expired(self._ttl_s, self._clock.wall())

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._order.remove(key)
            self._bytes -= entry.answer.size()
