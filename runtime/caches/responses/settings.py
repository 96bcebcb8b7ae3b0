"""What a user may say about the response cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import get_args

from ...errors import SettingsError, shown
from ..amounts import check_amounts
from .database import DEFAULT_DISK_BYTES, DEFAULT_DISK_ENTRIES
from .memory import DEFAULT_MEMORY_BYTES, DEFAULT_MEMORY_ENTRIES
from .store import Policy

_LEAST_DISK_BYTES = 2**20
# 30,000 years, which fits a Redis server's milliseconds.
_LONGEST_TTL_S = 1e12


@dataclass(frozen=True)
class ResponseCacheSettings:
    """Settings of the response cache. `load(..., response_cache=True)` means these defaults, or what `edgelm cache
    budget` set.

    memory_bytes, memory_entries: budgets in memory (estimated bytes). disk: keep them in a database as well, across
    restarts and for all processes of this user. disk_bytes (of the file, 1 MiB or more), disk_entries: its budgets.
    folder: where it is; None: EDGELM_HOME/responses. ttl_s: seconds that an answer lives; None: until a budget evicts
    it. policy: "lru" evicts the least recently used, "lfu" the least often used. redis_url: a Redis server
    (redis://, rediss://, unix://) that several machines share, in place of the disk; its own settings are its budget.
    Raises: SettingsError.
    """

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    memory_entries: int = DEFAULT_MEMORY_ENTRIES
    disk: bool = True
    disk_bytes: int = DEFAULT_DISK_BYTES
    disk_entries: int = DEFAULT_DISK_ENTRIES
    folder: str | Path | None = None
    ttl_s: float | None = None
    policy: Policy = "lru"
    redis_url: str | None = None

    def __post_init__(self) -> None:
        least = {"memory_bytes": 0, "memory_entries": 0, "disk_bytes": _LEAST_DISK_BYTES, "disk_entries": 0}
        check_amounts(self, least)
        kinds: dict[str, type | tuple[type, ...]] = {
            "disk": bool,
            "folder": (str, Path, NoneType),
            "redis_url": (str, NoneType),
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise SettingsError(f"{name} cannot be {shown(getattr(self, name))}")
        ttl = self.ttl_s
        if ttl is not None and (type(ttl) not in (int, float) or not 0 < ttl <= _LONGEST_TTL_S):
            raise SettingsError(
                f"ttl_s must be a number of seconds above 0, at most {_LONGEST_TTL_S:g}, or None, found {shown(ttl)}"
            )
        if self.policy not in get_args(Policy):
            raise SettingsError(f"policy must be {' or '.join(get_args(Policy))}, found {shown(self.policy)}")
