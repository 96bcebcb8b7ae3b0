"""Free memory is read correctly and checked before an allocation; too little is an error with figures."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model
from edgelm.runtime.errors import MemoryShortageError, SessionError
from edgelm.runtime.host import memory
from edgelm.runtime.sessions import kv_cache as kv
from edgelm.runtime.sessions.kernels import Use
from edgelm.runtime.sessions.kv_cache import KVCache
from edgelm.runtime.sessions.loading import open_session

GIB = 1 << 30
Limits = dict[str, tuple[str, int, int]]


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets the machine's free memory, the process's cgroup, and each cgroup's (limit, used, droppable file pages)."""

    def build(free: int, own: str | None = None, limits: Limits | None = None) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
        monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
        if own is not None:
            (tmp_path / "own").write_text(f"1:name=systemd:/old\n0::{own}\n")
        for group, (limit, used, droppable) in (limits or {}).items():
            folder = tmp_path / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")

    return build


def test_without_limits_the_machines_free_memory_counts(machine_with: Callable[..., None]) -> None:
    machine_with(3 * GIB)
    assert memory.available_bytes() == 3 * GIB


@pytest.mark.parametrize(
    ("own", "limits", "left"),
    [
        ("/", {".": (str(2 * GIB), GIB, 0)}, GIB),
        ("/a/b", {"a/b": ("max", GIB, 0), "a": (str(2 * GIB), GIB, 1000)}, GIB + 1000),
        ("/a/b", {"a/b": (str(GIB), 1000, 0), "a": (str(9 * GIB), 1000, 0)}, GIB - 1000),
        ("/a", {"a": (str(GIB), 2 * GIB, 0)}, 0),
        ("/a", {"a": ("nonsense", 0, 0)}, 3 * GIB),
        ("/gone", {}, 3 * GIB),
    ],
)
def test_the_tightest_group_counts(machine_with: Callable[..., None], own: str, limits: Limits, left: int) -> None:
    machine_with(3 * GIB, own, limits)
    assert memory.available_bytes() == left


def test_a_model_that_does_not_fit_is_refused_with_the_figures(
    tiny_bundle: Path, machine_with: Callable[..., None], without_kernels: None
) -> None:
    machine_with(50_000)
    with pytest.raises(MemoryShortageError, match=r"takes \d+ MiB of memory, and 0 MiB are left"):
        load(tiny_bundle)


def test_weights_mapped_for_kernels_need_no_memory(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("edgelm.runtime.sessions.loading.require_memory", lambda size, _: needed.append(size))
    for by_kernels in (True, False):
        use = Use(by_kernels, by_kernels, by_kernels)
        monkeypatch.setattr("edgelm.runtime.sessions.kernels.use_in", lambda *_, use=use: use)
        with contextlib.suppress(SessionError, ImportError):
            open_session(Bundle.open(tiny_bundle), 1).close()
    assert needed[0] == 0 < needed[1]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="resident memory differs between systems")


@linux_only
def test_zeros_take_memory_only_where_written_and_until_freed() -> None:
    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident()
    array = memory.zeros((64, 1 << 20), np.int8)
    array[3] = 1
    assert resident() - before < 8 << 20
    assert [row.any() for row in array] == [index == 3 for index in range(64)]
    array[:] = 2
    assert resident() - before > 56 << 20
    del array
    assert resident() - before < 8 << 20


@linux_only
def test_zeros_are_not_shared_with_a_forked_process() -> None:
    array = memory.zeros((3,), np.float32)
    child = os.fork()
    if not child:
        array[1] = 1
        os._exit(int(array[1] != 1))
    assert os.waitpid(child, 0)[1] == 0
    assert array.tolist() == [0, 0, 0]


def test_zeros_of_no_size_are_an_array_too() -> None:
    assert memory.zeros((2, 0, 5), np.float32).shape == (2, 0, 5)


def cache_of(positions: int) -> KVCache:
    layers = (LayerCache(2, 8, 8, None),)
    return KVCache(Model(10, positions, 1, layers, CacheType("int8", "channel")))


def test_a_cache_grows_to_the_needed_size_if_doubling_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(100_000)
    cache.reserve(256)
    monkeypatch.setattr(kv, "available_bytes", lambda: 300 * cache.bytes_per_position())
    cache.reserve(300)
    assert cache.capacity == 300


def test_a_cache_takes_the_needed_size_if_the_expected_one_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = cache_of(100_000)
    cache.expected = 400
    monkeypatch.setattr(kv, "available_bytes", lambda: 300 * cache.bytes_per_position())
    cache.reserve(270)
    assert cache.capacity == 270


@pytest.mark.parametrize("positions", [6_000, 3_700, 3_000, 2_200])
def test_a_cache_is_seldom_reallocated_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """A prompt of 1,900 tokens in pieces, and 200 tokens of an answer."""
    cache = cache_of(100_000)
    cache.expected = 3_800
    monkeypatch.setattr(kv, "available_bytes", lambda: positions * cache.bytes_per_position())
    moves = [cache.reserve(length) for length in (384, 768, 1_152, 1_536, *range(1_900, 2_101))]
    assert sum(moves) <= 6
    assert cache.capacity >= 2_100


def test_a_cache_that_cannot_grow_stays_as_it_is(machine_with: Callable[..., None]) -> None:
    cache = cache_of(100_000)
    cache.reserve(256)
    cache.length = 200
    before = dict(cache.buffers())
    machine_with(1000)
    with pytest.raises(MemoryShortageError, match="a conversation of 70,000 tokens takes"):
        cache.reserve(70_000)
    cache.check()
    assert cache.length == 200
    assert {name: id(buffer) for name, buffer in cache.buffers()} == {name: id(item) for name, item in before.items()}


def test_an_answer_ends_in_an_error_and_the_engine_lives_on(
    tiny_bundle: Path, machine_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt: dict[str, Any] = {"token_ids": [1, 2, 3] * 100, "max_tokens": 4}
    with load(tiny_bundle, response_cache=False) as engine:
        engine.generate("short", max_tokens=2)
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
            with pytest.raises(MemoryShortageError):
                engine.generate(**prompt)
        after = engine.generate(**prompt)
    with load(tiny_bundle, response_cache=False) as fresh:
        assert fresh.generate(**prompt).token_ids == after.token_ids
