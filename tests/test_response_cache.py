"""The response cache against a simple model of it: recency, byte budget, counters, keys, and use by many threads."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from edgelm.runtime.response_cache import DEFAULT_BUDGET_BYTES, CachedAnswer, FinishReason, ResponseCache, response_key


def answer(words: int, letter: str = "a", reason: FinishReason = "stop") -> CachedAnswer:
    return CachedAnswer(tuple((letter, (index,)) for index in range(words)), reason)


class CacheMachine(RuleBasedStateMachine):
    """The model is a list of pairs, the least recently used one first."""

    keys = Bundle("keys")

    @initialize(budget=st.integers(0, 6_000))
    def start(self, budget: int) -> None:
        self.cache = ResponseCache(budget)
        self.budget = budget
        self.model: list[tuple[str, CachedAnswer]] = []
        self.hits = self.misses = 0

    @rule(target=keys, name=st.sampled_from("abcdef"))
    def key(self, name: str) -> str:
        return name

    @rule(key=keys, words=st.integers(1, 20), letter=st.sampled_from("xyz"))
    def put(self, key: str, words: int, letter: str) -> None:
        stored = answer(words, letter)
        self.cache.put(key, stored)
        self.model = [entry for entry in self.model if entry[0] != key]
        if stored.size() <= self.budget:
            self.model.append((key, stored))
            while sum(kept.size() for _, kept in self.model) > self.budget:
                del self.model[0]

    @rule(key=keys)
    def get(self, key: str) -> None:
        known = next((entry for entry in self.model if entry[0] == key), None)
        assert self.cache.get(key) == (known[1] if known else None)
        if known is None:
            self.misses += 1
        else:
            self.hits += 1
            self.model.remove(known)
            self.model.append(known)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model = []

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check()
        assert len(self.cache) == len(self.model)
        assert self.cache.bytes == sum(kept.size() for _, kept in self.model) <= self.budget
        assert (self.cache.hits, self.cache.misses) == (self.hits, self.misses)


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_the_least_recently_used_answer_goes_first() -> None:
    size = answer(2).size()
    cache = ResponseCache(3 * size)
    for key in "abc":
        cache.put(key, answer(2))
    cache.get("a")
    cache.put("b", answer(2, "z"))
    cache.put("d", answer(2))
    assert cache.get("c") is None
    assert [cache.get(key) is not None for key in "abd"] == [True, True, True]


def test_an_answer_of_exactly_the_budget_is_stored_and_a_byte_more_is_not() -> None:
    size = answer(5).size()
    assert len(_filled(ResponseCache(size), answer(5))) == 1
    assert len(_filled(ResponseCache(size - 1), answer(5))) == 0


def test_an_oversized_answer_evicts_no_other_but_replaces_its_own_key() -> None:
    cache = ResponseCache(answer(3).size() * 2)
    cache.put("a", answer(3))
    cache.put("b", answer(3))
    cache.put("big", answer(1_000))
    assert cache.get("a") == cache.get("b") == answer(3)
    cache.put("a", answer(1_000))
    assert cache.get("a") is None, "an outdated answer must not stay"
    assert cache.get("b") == answer(3)
    cache.check()


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


def test_clearing_keeps_the_counters() -> None:
    cache = _filled(ResponseCache(), answer(1))
    cache.get("key")
    cache.get("other")
    cache.clear()
    assert (len(cache), cache.bytes, cache.hits, cache.misses) == (0, 0, 1, 1)


def test_threads_leave_the_cache_consistent_and_never_see_a_wrong_answer() -> None:
    keys = [f"key {index}" for index in range(12)]
    answers = {key: answer(index + 1, chr(97 + index)) for index, key in enumerate(keys)}
    cache = ResponseCache(sum(kept.size() for kept in answers.values()) // 2)
    start, wrong, asked = threading.Barrier(8), [], []

    def work(seed: int) -> None:
        start.wait(30)
        count = 0
        for turn in range(600):
            key = keys[(seed * 7 + turn * (seed + 1)) % len(keys)]
            if turn % 3 == 0:
                cache.put(key, answers[key])
            elif turn % 97 == 0:
                cache.clear()
            else:
                found = cache.get(key)
                count += 1
                if found not in (None, answers[key]):
                    wrong.append(key)
        asked.append(count)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    cache.check()
    assert not wrong
    assert len(asked) == 8
    assert cache.hits + cache.misses == sum(asked)


def test_the_default_budget_is_16_mebibytes() -> None:
    assert DEFAULT_BUDGET_BYTES == 16 * 2**20


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
def test_whatever_differs_gives_another_key(other: tuple[str, list[int], dict[str, Any]]) -> None:
    assert response_key(*other) != response_key("sha256:ab", [1, 2], {"max_tokens": 3})


def _filled(cache: ResponseCache, stored: CachedAnswer) -> ResponseCache:
    cache.put("key", stored)
    return cache
