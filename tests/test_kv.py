"""The KV cache's buffers start small, double up to the context's length, and keep their contents when they grow."""

from __future__ import annotations

import errno
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model
from edgelm.runtime.errors import MemoryShortageError
from edgelm.runtime.sessions.kv_cache import KVCache

# Layers of different shapes, and one without attention.
LAYERS = (LayerCache(2, 3, 5, None), None, LayerCache(1, 4, 4, 16))
NAMES = ["0.key", "0.value", "2.key", "2.value"]


def model(context_length: int = 5_000, type_: str = "int8") -> Model:
    return Model(10, context_length, 0, LAYERS, CacheType(type_, None))


def fill(cache: KVCache, begin: int, end: int) -> None:
    """Write a value that encodes position, head and element into each position from begin to end."""
    for _, buffer in cache.buffers():
        shape = buffer[:, :, begin:end].shape
        buffer[:, :, begin:end] = pattern(shape, begin).astype(buffer.dtype)
    cache.length = end


def pattern(shape: tuple[int, ...], begin: int) -> NDArray[np.int64]:
    _, head, position, element = np.indices(shape)
    return np.asarray((head * 31 + (position + begin) * 7 + element * 3) % 101, np.int64)


def check_contents(cache: KVCache) -> None:
    cache.check()
    for name, buffer in cache.buffers():
        used = buffer[:, :, : cache.length]
        assert np.array_equal(used, pattern(used.shape, 0)), name


@pytest.mark.parametrize(("type_", "dtype", "width"), [("int8", np.int8, 1), ("float32", np.float32, 4)])
def test_the_buffers_have_each_layers_own_shape(type_: str, dtype: type[np.generic], width: int) -> None:
    cache = KVCache(model(type_=type_))
    assert (cache.capacity, cache.length, dict(cache.buffers())) == (0, 0, {})
    cache.check()
    assert cache.reserve(1)
    buffers = dict(cache.buffers())
    assert list(buffers) == NAMES
    assert [buffer.shape for buffer in buffers.values()] == [
        (1, 2, 256, 3),
        (1, 2, 256, 5),
        (1, 1, 256, 4),
        (1, 1, 256, 4),
    ]
    assert all(buffer.dtype == dtype for buffer in buffers.values())
    assert cache.bytes_per_position() == (2 * 8 + 8) * width
    assert sum(buffer.nbytes for buffer in buffers.values()) == 256 * cache.bytes_per_position()


def test_capacity_starts_at_256_doubles_and_stops_one_above_the_context() -> None:
    cache = KVCache(model(context_length=1_500))
    capacities: list[int] = []
    for positions in range(1, 1_502):
        moved = cache.reserve(positions)
        assert moved == (not capacities or cache.capacity != capacities[-1])
        if moved:
            capacities.append(cache.capacity)
        assert cache.capacity >= positions
    assert capacities == [256, 512, 1_024, 1_501]


@pytest.mark.parametrize(("context", "first"), [(1, 2), (100, 101), (255, 256), (256, 256), (4_096, 256)])
def test_a_small_context_is_never_exceeded(context: int, first: int) -> None:
    cache = KVCache(model(context_length=context))
    cache.reserve(1)
    assert cache.capacity == first
    cache.reserve(context + 1)
    assert cache.capacity == max(first, context + 1)


def test_a_large_request_is_allocated_at_once() -> None:
    cache = KVCache(model())
    assert cache.reserve(3_000)
    assert cache.capacity == 3_000
    assert not cache.reserve(3_000)
    assert cache.reserve(3_001)
    assert cache.capacity == 5_001


def test_expected_positions_are_allocated_at_once() -> None:
    cache = KVCache(model())
    cache.expected = 700
    assert cache.reserve(300)
    assert cache.capacity == 700
    assert not cache.reserve(700)
    assert cache.reserve(701)
    assert cache.capacity == 1_400
    cache.expected = 90_000
    assert cache.reserve(1_401)
    assert cache.capacity == 5_001


def test_buffers_stay_the_same_objects_until_reserve_returns_true() -> None:
    cache = KVCache(model())
    cache.reserve(10)
    before = dict(cache.buffers())
    assert not cache.reserve(256)
    assert all(buffer is before[name] for name, buffer in cache.buffers())
    assert cache.reserve(257)
    assert all(buffer is not before[name] for name, buffer in cache.buffers())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["append", "truncate"]), st.integers(0, 700)), max_size=12),
    st.sampled_from(["int8", "float32"]),
)
def test_contents_survive_growth_and_truncation(operations: list[tuple[str, int]], type_: str) -> None:
    context = 2_000
    cache = KVCache(model(context, type_))
    for operation, amount in operations:
        if operation == "append":
            begin, end = cache.length, min(cache.length + amount, context)
            capacity = cache.capacity
            assert cache.reserve(end) == (end > capacity)
            fill(cache, begin, end)
            assert cache.capacity <= context + 1
        else:
            kept = cache.length * amount // 700
            capacity = cache.capacity
            cache.truncate(kept)
            assert (cache.length, cache.capacity) == (kept, capacity)
        check_contents(cache)


@pytest.mark.parametrize("length", [-1, 6])
def test_truncating_beyond_the_contents_is_refused(length: int) -> None:
    cache = KVCache(model())
    cache.reserve(10)
    cache.length = 5
    with pytest.raises(ValueError, match="5 positions"):
        cache.truncate(length)
    assert cache.length == 5
    cache.truncate(5)
    cache.truncate(0)
    assert cache.length == 0


def test_check_finds_a_broken_invariant() -> None:
    cache = KVCache(model())
    cache.reserve(10)
    cache.length = 257
    with pytest.raises(AssertionError):
        cache.check()
    cache.length = -1
    with pytest.raises(AssertionError):
        cache.check()
    cache.length = 0
    cache.capacity = 300
    with pytest.raises(AssertionError):
        cache.check()


def test_a_model_without_attention_needs_no_buffers() -> None:
    cache = KVCache(Model(10, 100, 0, (None, None), CacheType("int8", None)))
    assert cache.reserve(5)
    assert dict(cache.buffers()) == {}
    assert cache.bytes_per_position() == 0
    cache.check()


@pytest.mark.parametrize("failing_call", range(4))
def test_growth_that_runs_out_of_memory_changes_nothing(failing_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(model())
    cache.reserve(200)
    fill(cache, 0, 200)
    real_mmap, calls = mmap.mmap, iter(range(100))

    def refusing(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == failing_call:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real_mmap(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refusing)
        with pytest.raises(MemoryShortageError, match=r"refuses \d+ MiB of memory \(Cannot allocate memory\)"):
            cache.reserve(257)
    assert cache.capacity == 256
    check_contents(cache)
    assert cache.reserve(257), "the next attempt must report new buffers, to be bound again"
    check_contents(cache)
