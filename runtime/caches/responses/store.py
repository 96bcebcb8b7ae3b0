"""The protocol of a store of answers, and what every store reports about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .answers import CachedAnswer

Policy = Literal["lru", "lfu"]


@dataclass(frozen=True)
class StoreStats:
    """entries: number of answers; bytes: their size; the budgets, None where the server sets them."""

    entries: int
    bytes: int
    max_entries: int | None
    max_bytes: int | None


class AnswerStore(Protocol):
    """Answers under keys (`answers.response_key`). All methods may be called from any thread.

    Stores outside of this process raise CacheError where they cannot do what was asked; nothing was changed then.
    """

    def get(self, key: str) -> CachedAnswer | None:
        """The answer that was stored under this very key, or None. Counts as a use."""

    def touch(self, key: str) -> None:
        """Count a use of an answer that a faster store returned. Always fast: a store may note it later, or not at
        all."""

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer, replacing an old one, and evict others until the budgets hold. An answer that exceeds the
        budgets by itself is not stored."""

    def clear(self) -> None:
        """Forget all answers."""

    def stats(self) -> StoreStats:
        """Numbers of this moment."""

    def check(self) -> None:
        """Raise CacheCorruptError if an invariant does not hold or an entry is damaged. Cost: reads all entries."""

    def close(self) -> None:
        """Write what waits to be written, free files and connections. A later call opens them again."""
