"""The response cache of an engine: keys, memory before an outer store, concurrent equal requests, failing stores."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime.caches.responses.cache import (
    CachedAnswer,
    ResponseCache,
    ResponseCacheSettings,
    open_response_cache,
    response_key,
)
from edgelm.runtime.caches.responses.memory import MemoryStore
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.caches.responses.store import StoreStats
from edgelm.runtime.errors import CacheError, SettingsError

from .fake_clock import FakeClock


def answer(words: int = 1, letter: str = "a") -> CachedAnswer:
    return CachedAnswer(tuple((letter, (index,)) for index in range(words)), "stop")


class DictStore:
    """An outer store in a dictionary. It fails while `fails` is set, and records its calls."""

    def __init__(self) -> None:
        self.answers: dict[str, CachedAnswer] = {}
        self.calls: list[str] = []
        self.fails: str | None = None

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.fails is not None:
            raise CacheError(self.fails)

    def get(self, key: str) -> CachedAnswer | None:
        self._called("get")
        return self.answers.get(key)

    def touch(self, key: str) -> None:
        self._called("touch")

    def put(self, key: str, answer: CachedAnswer) -> None:
        self._called("put")
        self.answers[key] = answer

    def clear(self) -> None:
        self._called("clear")
        self.answers.clear()

    def stats(self) -> StoreStats:
        return StoreStats(len(self.answers), 0, None, None)

    def check(self) -> None:
        self._called("check")

    def close(self) -> None:
        self._called("close")


# ---- keys


def test_a_key_is_the_hash_of_its_written_canonical_form() -> None:
    canonical = '["sha256:ab",[1,2],{"max_tokens":3,"stop_ids":[7]}]'
    expected = "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()
    assert response_key("sha256:ab", [1, 2], {"stop_ids": [7], "max_tokens": 3}) == expected
    assert response_key("sha256:ab", (1, 2), {"max_tokens": 3, "stop_ids": [7]}) == expected


@pytest.mark.parametrize(
    "other",
    [
        ("sha256:ac", [1, 2], {"max_tokens": 3}),
        ("sha256:ab", [12], {"max_tokens": 3}),
        ("sha256:ab", [2, 1], {"max_tokens": 3}),
        ("sha256:ab", [1, 2], {"max_tokens": 4}),
        ("sha256:ab", [1, 2], {"max_tokens": 3, "stop_ids": []}),
    ],
)
def test_any_difference_gives_another_key(other: tuple[str, list[int], dict[str, Any]]) -> None:
    assert response_key(*other) != response_key("sha256:ab", [1, 2], {"max_tokens": 3})


# ---- two stores


def test_an_answer_from_the_outer_store_is_then_kept_in_memory() -> None:
    outer = DictStore()
    ResponseCache(outer=outer).put("key", answer())
    other = ResponseCache(outer=outer)
    assert other.get("key") == answer()
    del outer.answers["key"]
    assert other.get("key") == answer()
    assert (other.hits, other.misses, len(other)) == (2, 0, 1)


def test_a_hit_in_memory_counts_as_a_use_in_the_outer_store() -> None:
    outer = DictStore()
    cache = ResponseCache(outer=outer)
    cache.put("key", answer())
    cache.get("key")
    assert outer.calls == ["put", "touch"]


def test_memory_keeps_an_answer_no_longer_than_the_outer_store_would() -> None:
    clock = FakeClock()
    outer = DictStore()
    outer.answers["key"] = dataclasses.replace(answer(), created=clock.wall() - 8)
    cache = ResponseCache(MemoryStore(ttl_s=10, clock=clock.clock), outer)
    assert cache.get("key") == answer()
    outer.answers.clear()
    clock.pass_time(3)
    assert cache.get("key") is None


def test_clearing_and_closing_reach_both_stores_and_keep_the_counters() -> None:
    outer = DictStore()
    cache = ResponseCache(outer=outer)
    cache.put("key", answer())
    cache.get("key")
    cache.get("other")
    cache.clear()
    assert cache.get("key") is None
    assert (len(cache), outer.answers, cache.hits, cache.misses) == (0, {}, 1, 2)
    cache.check()
    cache.close()
    assert outer.calls[-2:] == ["check", "close"]


# ---- a store that fails


def test_a_failing_store_is_one_warning_and_is_retried_after_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, outer = FakeClock(), DictStore()
    cache = ResponseCache(outer=outer, clock=clock.clock)
    outer.fails = "the disk is gone"
    cache.put("key", answer())
    assert cache.get("key") == answer() and cache.get("other") is None
    cache.clear()
    cache.close()
    assert outer.calls == ["put"]
    clock.pass_time(61)
    assert cache.get("other") is None
    assert outer.calls == ["put", "get"]
    outer.fails = None
    clock.pass_time(61)
    cache.put("key", answer(2))
    assert outer.answers == {"key": answer(2)}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == ["the disk is gone; answers are kept in memory only for now"]


# ---- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": -1},
        {"memory_entries": True},
        {"memory_entries": 2**63},
        {"disk_bytes": 10**5000},
        {"disk_entries": 10**400},
        {"ttl_s": 10**400},
        {"ttl_s": 1e13},
        {"policy": 10**5000},
        {"disk_bytes": 1000},
        {"disk_entries": 1.5},
        {"ttl_s": 0},
        {"ttl_s": float("nan")},
        {"ttl_s": "1"},
        {"policy": "fifo"},
        {"disk": 1},
        {"folder": 5},
        {"redis_url": b"redis://localhost"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        ResponseCacheSettings(**wrong)


def test_other_types_than_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="response_cache"):
        open_response_cache("yes")  # type: ignore[arg-type]


def test_settings_decide_what_is_opened(edgelm_home: Path, tmp_path: Path) -> None:
    assert open_response_cache(False) is None
    for wanted, database in [
        (True, edgelm_home / "responses" / "responses.sqlite"),
        (ResponseCacheSettings(folder=tmp_path / "there"), tmp_path / "there" / "responses.sqlite"),
        (ResponseCacheSettings(folder=str(tmp_path / "text")), tmp_path / "text" / "responses.sqlite"),
    ]:
        cache = open_response_cache(wanted)
        assert cache is not None and not database.exists()
        cache.put("key", answer())
        assert database.exists()
        cache.close()
    memory_only = open_response_cache(ResponseCacheSettings(disk=False, folder=tmp_path / "none"))
    assert memory_only is not None
    memory_only.put("key", answer())
    assert not (tmp_path / "none").exists()


def test_budgets_of_the_settings_reach_the_stores(tmp_path: Path) -> None:
    cache = open_response_cache(ResponseCacheSettings(memory_entries=2, disk_entries=3, folder=tmp_path))
    assert cache is not None
    for number in range(6):
        cache.put(f"key {number}", answer())
    cache.close()
    assert len(cache) == 2
    assert SqliteStore(tmp_path).stats().entries == 3


def test_without_a_home_answers_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EDGELM_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cache = open_response_cache(True)
    assert cache is not None
    cache.put("key", answer())
    assert cache.get("key") == answer()
    assert "set EDGELM_HOME" in caplog.text
