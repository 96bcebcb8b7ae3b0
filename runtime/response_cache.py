"""An exact cache of whole answers in memory: the same request to the same bundle is computed once.

The key holds everything that can change the answer, so a hit is the answer that would be computed. Only finished
answers are stored. Nothing is pickled, nothing leaves the process.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_BUDGET_BYTES = 16 * 1024 * 1024
# What Python objects cost, as sys.getsizeof adds them up: an entry's key, dataclass and table slot; a chunk's tuples
# and string; an id's integer and reference.
_ENTRY_BYTES = 400
_CHUNK_BYTES = 160
_ID_BYTES = 36

FinishReason = Literal["stop", "length", "context_full"]


@dataclass(frozen=True)
class CachedAnswer:
    """A finished answer as it was streamed: (text, token ids) of each chunk, and why it ended."""

    chunks: tuple[tuple[str, tuple[int, ...]], ...]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the whole answer."""
        return tuple(token for _, ids in self.chunks for token in ids)

    def size(self) -> int:
        """Estimated bytes in memory."""
        return _ENTRY_BYTES + sum(_CHUNK_BYTES + 4 * len(text) + _ID_BYTES * len(ids) for text, ids in self.chunks)


def response_key(bundle_digest: str, token_ids: Sequence[int], settings: Mapping[str, Any]) -> str:
    """ "sha256:" and the hash of the canonical JSON of [bundle digest, token ids, settings], keys sorted, no blanks."""
    canonical = json.dumps([bundle_digest, list(token_ids), dict(settings)], sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()


class ResponseCache:
    """Least recently used answers within a byte budget.

    Every method is atomic between threads (one lock, held for dictionary work only) and costs O(1), `put` O(evicted).
    Nothing is shared between processes. No method raises for what the cache holds.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self._budget = budget_bytes
        self._entries: OrderedDict[str, CachedAnswer] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> CachedAnswer | None:
        """The answer stored under a key, which becomes the most recently used one, or None. Counts a hit or a miss."""
        with self._lock:
            answer = self._entries.get(key)
            if answer is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return answer

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer, dropping the least recently used ones until it fits. One larger than the budget is not
        stored."""
        with self._lock:
            self._drop(key)
            if answer.size() > self._budget:
                return
            self._entries[key] = answer
            self._bytes += answer.size()
            while self._bytes > self._budget:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget all answers; the counters stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    @property
    def bytes(self) -> int:
        """Estimated bytes of all entries, never above the budget."""
        with self._lock:
            return self._bytes

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold. Cost: O(entries). For tests."""
        with self._lock:
            assert self._bytes == sum(answer.size() for answer in self._entries.values())
            assert 0 <= self._bytes <= self._budget

    def _drop(self, key: str) -> None:
        answer = self._entries.pop(key, None)
        if answer is not None:
            self._bytes -= answer.size()
