"""The stores of answers against a simple model: recency, frequency, time to live, budgets, encoding."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgelm.runtime.caches.responses.answers import CachedAnswer, decode_answer, encode_answer
from edgelm.runtime.caches.responses.database import DiskBudget
from edgelm.runtime.caches.responses.memory import MemoryStore
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.caches.responses.store import AnswerStore, Policy
from edgelm.runtime.errors import CacheCorruptError
from edgelm.runtime.results import CompleteReason

from .fake_clock import FakeClock

KEYS = "abcdefgh"


def answer(words: int, letter: str = "a", reason: CompleteReason = "stop", created: float = 0.0) -> CachedAnswer:
    return CachedAnswer(tuple((letter, (index,)) for index in range(words)), reason, created)


class Model:
    """A list of entries with their use counts, least recently used first."""

    def __init__(self, max_bytes: int | None, max_entries: int, ttl: float | None, policy: Policy) -> None:
        self.max_bytes, self.max_entries, self.ttl, self.policy = max_bytes, max_entries, ttl, policy
        self.entries: list[tuple[str, CachedAnswer, int]] = []

    def find(self, key: str, now: float) -> CachedAnswer | None:
        for index, (name, kept, uses) in enumerate(self.entries):
            if name == key and not kept.expired(self.ttl, now):
                self.entries.append((key, kept, uses + 1))
                del self.entries[index]
                return kept
        return None

    def put(self, key: str, new: CachedAnswer, now: float) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != key]
        if self.max_bytes is not None and new.size() > self.max_bytes:
            return
        while len(self.entries) >= self.max_entries or self._bytes() + new.size() > (self.max_bytes or 10**9):
            del self.entries[self._victim()]
        self.entries.append((key, new, 1))

    def drop_expired(self, now: float) -> None:
        self.entries = [entry for entry in self.entries if not entry[1].expired(self.ttl, now)]

    def _bytes(self) -> int:
        return sum(kept.size() for _, kept, _ in self.entries)

    def _victim(self) -> int:
        if self.policy == "lru":
            return 0
        return min(range(len(self.entries)), key=lambda index: self.entries[index][2])


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a store and its model."""

    on_disk: ClassVar[bool]
    store: AnswerStore

    @initialize(
        max_bytes=st.integers(0, 6_000),
        max_entries=st.integers(1, 6),
        ttl=st.one_of(st.none(), st.just(100.0)),
        policy=st.sampled_from(("lru", "lfu")),
    )
    def start(self, max_bytes: int, max_entries: int, ttl: float | None, policy: Policy) -> None:
        self.clock = FakeClock()
        self.options: dict[str, Any] = {"ttl_s": ttl, "policy": policy, "clock": self.clock.clock}
        self.folder = tempfile.TemporaryDirectory()
        self.max_entries = max_entries
        self.uses_wait = False  # uses that the store has noted and not written
        if self.on_disk:
            self.store = self.open_disk()
        else:
            self.store = MemoryStore(max_bytes, max_entries, **self.options)
        self.model = Model(None if self.on_disk else max_bytes, max_entries, ttl, policy)

    def open_disk(self) -> SqliteStore:
        return SqliteStore(Path(self.folder.name), DiskBudget(2**20, self.max_entries), **self.options)

    @rule(key=st.sampled_from(KEYS), words=st.integers(1, 20), letter=st.sampled_from("xyz"))
    def put(self, key: str, words: int, letter: str) -> None:
        new = answer(words, letter, created=self.clock.wall())
        self.store.put(key, new)
        if self.on_disk:
            self.model.drop_expired(self.clock.wall())
        self.uses_wait = False
        self.model.put(key, new, self.clock.wall())

    @rule(key=st.sampled_from(KEYS))
    def get(self, key: str) -> None:
        found = self.store.get(key)
        assert found == self.model.find(key, self.clock.wall())
        self.uses_wait |= found is not None
        if found is None:  # reading removes expired entries from memory
            self.forget_expired(key)

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key: str) -> None:
        if self.model.find(key, self.clock.wall()) is None:
            self.store.get(key)
            self.forget_expired(key)
        else:
            self.store.touch(key)
            self.uses_wait = True

    def forget_expired(self, key: str) -> None:
        if not self.on_disk:
            self.model.entries = [entry for entry in self.model.entries if entry[0] != key]

    @rule(seconds=st.sampled_from((1.0, 60.0, 99.0, 500.0)))
    def wait(self, seconds: float) -> None:
        self.clock.pass_time(seconds)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.model.entries = []
        self.uses_wait = False

    @precondition(lambda self: self.on_disk)
    @rule()
    def restart(self) -> None:
        self.store.close()
        if self.uses_wait:  # a file that is written to loses its expired answers
            self.model.drop_expired(self.clock.wall())
        self.uses_wait = False
        self.store = self.open_disk()

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.store.check()
        stats = self.store.stats()
        assert stats.entries == len(self.model.entries) <= self.max_entries
        assert stats.max_bytes is not None and stats.bytes <= stats.max_bytes
        if not self.on_disk:
            assert stats.bytes == sum(kept.size() for _, kept, _ in self.model.entries)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


def test_closing_a_file_with_unwritten_uses_drops_its_expired_answers() -> None:
    machine = DiskMachine()
    machine.start(max_bytes=0, max_entries=1, ttl=100.0, policy="lru")
    machine.put(key="a", letter="x", words=1)
    machine.get(key="a")
    machine.wait(seconds=500.0)
    machine.restart()
    machine.agrees_with_the_model()
    assert machine.store.stats().entries == 0
    machine.teardown()


class MemoryMachine(StoreMachine):
    on_disk = False


class DiskMachine(StoreMachine):
    on_disk = True


MemoryMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
DiskMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase
TestDiskMachine = DiskMachine.TestCase


# ---- memory only


def test_an_answer_of_exactly_the_budget_is_stored_and_a_byte_more_is_not() -> None:
    size = answer(5).size()
    for budget, entries in ((size, 1), (size - 1, 0)):
        store = MemoryStore(budget)
        store.put("key", answer(5))
        assert store.stats().entries == entries


def test_an_oversized_answer_evicts_no_other_but_replaces_its_own_key() -> None:
    store = MemoryStore(answer(3).size() * 2)
    store.put("a", answer(3))
    store.put("b", answer(3))
    store.put("big", answer(1_000))
    assert store.get("a") == store.get("b") == answer(3)
    store.put("a", answer(1_000))
    assert store.get("a") is None, "an outdated answer must not stay"
    assert store.get("b") == answer(3)
    store.check()


def test_the_size_grows_with_text_ids_and_chunks() -> None:
    base = CachedAnswer((("text", (1, 2)),), "stop")
    for larger in (
        CachedAnswer((("texts", (1, 2)),), "stop"),
        CachedAnswer((("text", (1, 2, 3)),), "stop"),
        CachedAnswer((("te", (1,)), ("xt", (2,))), "stop"),
    ):
        assert larger.size() > base.size()
    assert base.token_ids == (1, 2)
    assert CachedAnswer((("a", (1,)), ("", (2, 3)), ("b", ())), "length").token_ids == (1, 2, 3)


def test_threads_leave_the_store_consistent_and_never_see_a_wrong_answer() -> None:
    keys = [f"key {index}" for index in range(12)]
    answers = {key: answer(index + 1, chr(97 + index)) for index, key in enumerate(keys)}
    store = MemoryStore(sum(kept.size() for kept in answers.values()) // 2, policy="lfu")
    start, wrong, asked = threading.Barrier(8), [], []

    def work(seed: int) -> None:
        start.wait(30)
        for turn in range(600):
            key = keys[(seed * 7 + turn * (seed + 1)) % len(keys)]
            if turn % 3 == 0:
                store.put(key, answers[key])
            elif turn % 97 == 0:
                store.clear()
            elif store.get(key) not in (None, answers[key]):
                wrong.append(key)
        asked.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    store.check()
    assert not wrong
    assert len(asked) == 8


# ---- clocks that jump


@pytest.fixture(params=["memory", "disk"])
def timed(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    clock = FakeClock()
    store: AnswerStore
    if request.param == "memory":
        store = MemoryStore(ttl_s=100, clock=clock.clock)
    else:
        store = SqliteStore(tmp_path, ttl_s=100, clock=clock.clock)
    with contextlib.closing(store):
        yield clock, store


def test_an_answer_lives_for_its_time_and_no_longer(timed: tuple[FakeClock, AnswerStore]) -> None:
    clock, store = timed
    store.put("key", answer(1, created=clock.wall()))
    clock.pass_time(99)
    assert store.get("key") == answer(1)
    clock.pass_time(1)
    assert store.get("key") is None
    store.put("late", answer(1, created=clock.wall() - 100))
    assert store.get("late") is None


def test_a_clock_that_jumps_shortens_lives(timed: tuple[FakeClock, AnswerStore]) -> None:
    clock, store = timed
    store.put("key", answer(1, created=clock.wall()))
    clock.jump(-30)
    assert store.get("key") == answer(1), "under a minute counts as an adjustment"
    clock.jump(-3600)
    store.put("new", answer(2, created=clock.wall()))
    assert store.get("new") == answer(2)
    assert store.get("key") is None, "its age is unknown"
    clock.jump(10**6)
    assert store.get("new") is None


def test_a_small_clock_adjustment_does_not_extend_lives_in_memory() -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=100, clock=clock.clock)
    store.put("key", answer(1, created=clock.wall()))
    clock.pass_time(60)
    clock.jump(-60)
    clock.pass_time(41)
    assert store.get("key") is None


def test_without_a_time_to_live_clocks_play_no_part(tmp_path: Path) -> None:
    clock = FakeClock()
    for store in (MemoryStore(clock=clock.clock), SqliteStore(tmp_path, clock=clock.clock)):
        store.put("key", answer(1, created=clock.wall() + 10**9))
        clock.jump(-(10**9))
        assert store.get("key") == answer(1)
        store.close()


# ---- encoding

ANSWERS = st.builds(
    CachedAnswer,
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=())), st.lists(st.integers(0, 2**31)).map(tuple)), min_size=1
    ).map(tuple),
    st.sampled_from(("stop", "length", "context_full")),
    st.floats(0, 2e9),
)


@given(ANSWERS, st.text())
def test_an_answer_survives_encoding_with_lone_surrogates(kept: CachedAnswer, key: str) -> None:
    found = decode_answer(key, encode_answer(key, kept))
    assert found == kept and found.created == kept.created


@given(ANSWERS, st.data())
def test_every_changed_byte_is_detected(kept: CachedAnswer, data: st.DataObject) -> None:
    good = encode_answer("key", kept)
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(bad), good[:position], good + b"x", b"", None, "text"):
        with pytest.raises(CacheCorruptError):
            decode_answer("key", wrong)
    with pytest.raises(CacheCorruptError):
        decode_answer("other key", good)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1.0, "stop"],
        [1.0, "stop", []],
        [1.0, "because", [["a", [1]]]],
        ["1", "stop", [["a", [1]]]],
        [1.0, "stop", [[1, [1]]]],
        [1.0, "stop", [["a", [True]]]],
        [1.0, "stop", [["a", ["1"]]]],
        [1.0, "stop", [["a", 1]]],
        [1.0, "stop", None],
        [1.0, ["stop"], [["a", [1]]]],
    ],
    ids=json.dumps,
)
def test_invalid_content_with_a_valid_checksum_is_refused(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda *_, plain=json.dumps, **__: plain(content))
    data = encode_answer("key", answer(1))
    with pytest.raises(CacheCorruptError):
        decode_answer("key", data)
