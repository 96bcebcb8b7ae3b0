"""Draft tokens: answers are those of plain decoding, bit for bit, whatever the drafts are; and drafts save steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Bundle, Completion, Engine
from edgelm.runtime.bundle.manifest import Quantization
from edgelm.runtime.decoding.prompt_lookup import Lookup, Pace, Text
from edgelm.runtime.decoding.row import Greedy, Row
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import SessionError
from edgelm.runtime.fake import FakeSession, NextToken
from edgelm.runtime.sessions.protocol import MOST_DRAFTS
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import TEXT, byte_tokenizer
from .test_decode import END, FailingSession, manifest, rule

LETTERS = 5


def repeating(period: int, noise: int, vocab_size: int = LETTERS) -> NextToken:
    """The next token is the one `period` tokens before, except that `noise` times in 10 it is random."""
    anything = rule(vocab_size * 10)

    def next_token(tokens: Sequence[int]) -> int:
        value = anything(tokens)
        return value // 10 if value % 10 < noise or len(tokens) < period else tokens[-period]

    return next_token


# ---- Text: where it repeats itself


def slow_following(ids: Sequence[int], count: int) -> list[int]:
    """The tokens after the last earlier n-gram, by searching every position; ignores which copy was followed so far."""
    for size in (3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if len(ids) >= size and ids[end - size : end] == ids[-size:]:
                followed = list(ids[end:])
                return [followed[index % len(followed)] for index in range(count)]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 20))
def test_the_last_occurrence_is_found_wherever_the_text_was_cut(ids: list[int], cut: int, count: int) -> None:
    text = Text(ids[:cut])
    for token in ids[cut:]:
        text.add(token)
    assert text.following(count) == slow_following(ids, count)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60))
def test_asking_after_each_token_finds_as_much_as_asking_once(ids: list[int]) -> None:
    """A draft always follows a position whose last two tokens are the text's own."""
    text, known = Text(()), []
    for token in ids:
        text.add(token)
        known.append(token)
        (*_, draft) = text.following(1) or [None]
        places = [end for end in range(2, len(known)) if known[end - 2 : end] == known[-2:]]
        assert (draft is None) == (not places)
        assert draft is None or draft in {known[end] for end in places}


def test_an_occurrence_being_copied_precedes_a_later_one() -> None:
    """1 2 3 occurs twice. A text that copies the first occurrence goes on with what followed there."""
    text = Text([7, 8, 1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 6, 7, 8])
    assert text.following(5) == [1, 2, 3, 4, 5]
    for token in (1, 2, 3):
        text.add(token)
    assert text.following(2) == [4, 5]
    text.add(6)
    assert text.following(2) == [6, 7]


def test_a_loop_is_expected_to_continue() -> None:
    assert Text([9, 1, 2, 1, 2, 1]).following(5) == [2, 1, 2, 1, 2]
    assert Text([1, 1, 1]).following(4) == [1, 1, 1, 1]


# ---- Pace: how many to try


def run(pace: Pace, outcome: Callable[[int], int], steps: int) -> list[int]:
    """The draft tokens wanted at each step; `outcome` maps them to the accepted number."""
    wanted = []
    for _ in range(steps):
        count = pace.wanted()
        wanted.append(count)
        if count:
            pace.learn(count, outcome(count))
    return wanted


def test_drafts_double_while_all_are_accepted() -> None:
    assert run(Pace(), lambda count: count, 7) == [1, 2, 4, 8, 16, 16, 16]
    assert MOST_DRAFTS == 16


def test_after_a_partial_success_as_many_drafts_as_were_accepted() -> None:
    assert run(Pace(), lambda count: min(count, 3), 6) == [1, 2, 4, 3, 6, 3]


def test_rejected_drafts_become_rare() -> None:
    wanted = run(Pace(), lambda _: 0, 1000)
    assert wanted[:12] == [1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert max(wanted) == 1
    assert sum(wanted) <= 1000 / 64 + 6


def test_free_drafts_are_always_made() -> None:
    assert run(Pace(free=1), lambda _: 0, 100) == [1] * 100
    assert run(Pace(free=1), lambda count: 1 if count == 1 else 0, 6) == [1, 2, 1, 2, 1, 2]


def test_one_success_ends_the_pauses() -> None:
    pace = Pace()
    run(pace, lambda _: 0, 40)
    while not pace.wanted():
        pass
    pace.learn(1, 1)
    assert pace.wanted() == 2


# ---- Sequencer: the same tokens, from the same rows, in fewer steps


class Recorder:
    """A chooser that records the rows it is asked for. It samples, so a superfluous row would change the choices after
    it."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else np.random.default_rng(seed)
        self.rows: list[bytes] = []

    def choose(self, logits: NDArray[np.float32]) -> int:
        self.rows.append(logits.tobytes())
        if self._random is None or self._random.random() < 0.7:
            return int(logits.argmax())
        return int(self._random.integers(len(logits)))


rules = st.tuples(st.integers(1, 9), st.integers(0, 10))
requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=30),
        st.integers(1, 60),
        st.sets(st.integers(0, LETTERS - 1), max_size=1),
        st.none() | st.integers(0, 3),
        st.none() | st.integers(0, 60),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(rules, requests, st.integers(1, 5))
def test_tokens_and_rows_are_those_of_plain_decoding(
    shape: tuple[int, int], asked: list[tuple[list[int], int, set[int], int | None, int | None]], piece_tokens: int
) -> None:
    """Several prompts one after another on one cache; some streams are closed early."""
    session = FakeSession(LETTERS, repeating(*shape))
    sequencer, lookup = Sequencer(session, piece_tokens), Lookup()
    for prompt, max_tokens, stop_ids, seed, taken in asked:
        plain, drafting = Recorder(seed), Recorder(seed)
        fresh = Sequencer(FakeSession(LETTERS, repeating(*shape)), piece_tokens)
        wanted = list(fresh.tokens(Row(prompt, max_tokens, plain, stop_ids)))[:taken]
        session.steps.clear()
        tokens = sequencer.tokens(Row(prompt, max_tokens, drafting, stop_ids, lookup=lookup))
        got = [token for token, _ in zip(tokens, wanted, strict=False)]
        tokens.close()  # type: ignore[attr-defined]
        assert got == wanted
        assert drafting.rows == plain.rows[: len(drafting.rows)]
        assert len(drafting.rows) - len(wanted) in (0, 1)
        assert all(len(step) <= max(piece_tokens, 1 + MOST_DRAFTS) for step in session.steps)
        assert session.length <= len(prompt) + max_tokens - 1, "draft tokens beyond the end of the answer"
    assert lookup.accepted <= lookup.drafted


@settings(max_examples=100, deadline=None)
@given(rules, st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 7))
def test_sliding_contexts_slide_the_same(shape: tuple[int, int], prompt: list[int], max_tokens: int, keep: int) -> None:
    def answer(lookup: Lookup | None) -> list[int]:
        session = FakeSession(LETTERS, repeating(*shape))
        row = Row(prompt, max_tokens, Greedy(), {0}, keep=keep, lookup=lookup)
        tokens = Sequencer(session, context_length=12).tokens(row)
        found = []
        for token in tokens:
            assert session.length <= 12
            found.append(token)
        return found

    assert answer(Lookup()) == answer(None)


@settings(max_examples=100, deadline=None)
@given(rules, st.sets(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 3))
def test_a_step_that_fails_leaves_a_sequencer_that_answers_right(
    shape: tuple[int, int], fail_at: set[int], start: int
) -> None:
    session = FailingSession(LETTERS, repeating(*shape), fail_at)
    sequencer = Sequencer(session)
    for length in range(start + 1, start + 6):
        prompt = [index % LETTERS for index in range(length)]
        wanted = list(Sequencer(FakeSession(LETTERS, repeating(*shape))).greedy(prompt, 40, ()))
        got: list[int] = []
        try:
            got.extend(sequencer.tokens(Row(prompt, 40, Greedy(), lookup=Lookup())))
        except SessionError:
            assert got == wanted[: len(got)]
        else:
            assert got == wanted


def test_a_text_that_is_copied_takes_few_steps() -> None:
    text = [(7 * index * index + index) % 211 for index in range(200)]  # no pair of tokens occurs twice
    session = FakeSession(211, lambda tokens: tokens[-len(text)])
    lookup = Lookup()
    prompt = [*text, *text[:2]]
    tokens = list(Sequencer(session).tokens(Row(prompt, 198, Greedy(), lookup=lookup)))
    assert tokens == text[2:]
    # One for the prompt, 2 + 3 + 5 + 9 tokens while drafts grow, then 17 a step.
    assert len(session.steps) == 1 + 4 + 11
    assert lookup.accepted == 198 - len(session.steps)


def test_a_text_that_never_repeats_is_decoded_in_plain_steps() -> None:
    session = FakeSession(300, lambda tokens: len(tokens) % 300)
    list(Sequencer(session).tokens(Row([0, 1, 2], 250, Greedy(), lookup=Lookup())))
    assert [len(step) for step in session.steps] == [3, *[1] * 249]


# ---- Engine


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return folder


def engine_on(session: FakeSession, folder: Path, **changes: Any) -> Engine:
    described = dataclasses.replace(manifest(context_length=200), **changes)
    return Engine(Bundle(folder, described), session, Tokenizer(folder / "tokenizer.json"), None)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 7},
    {"stop": ["ab", "c"]},
    {"stop": ["b"], "min_tokens": 9},
    {"stop_token_ids": [97]},
    {"logprobs": 2},
    {"temperature": 0.3, "seed": 3},
    {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "seed": 4, "logprobs": 1},
    {"repetition_penalty": 1.3, "presence_penalty": 0.1, "frequency_penalty": 0.05},
    {"logit_bias": {97: -1.0}, "min_tokens": 20},
    {"context_full": "slide", "keep": 3, "max_tokens": 400},
]


def answer(done: Completion) -> dict[str, Any]:
    """Everything but the counts."""
    return {**dataclasses.asdict(done), "stats": None}


@pytest.mark.parametrize("chosen", SETTINGS)
@settings(max_examples=8, deadline=None)
@given(prompt=st.text("abc", min_size=1, max_size=20), shape=rules)
def test_completions_are_the_same(
    chosen: dict[str, Any], tokenizer_folder: Path, prompt: str, shape: tuple[int, int]
) -> None:
    engine = engine_on(FakeSession(END + 1, repeating(*shape, vocab_size=END + 1)), tokenizer_folder)
    plain = engine.generate(prompt, lookup=False, **chosen)
    assert answer(engine.generate(prompt, **chosen)) == answer(plain)
    assert plain.stats.guessed_tokens == plain.stats.accepted_tokens == 0


def test_stats_count_draft_tokens(tokenizer_folder: Path) -> None:
    engine = engine_on(FakeSession(END + 1, lambda tokens: tokens[-3]), tokenizer_folder)
    stats = engine.generate("abcabc", max_tokens=100).stats
    assert stats.accepted_tokens == stats.guessed_tokens > 80


@pytest.mark.parametrize(
    "change", [{"quantization": Quantization("int8-tensor", ())}, {"quantization": Quantization("unknown", ())}]
)
def test_no_drafts_if_they_could_change_an_answer(tokenizer_folder: Path, change: dict[str, Any]) -> None:
    session = FakeSession(END + 1, lambda tokens: tokens[-3])
    engine = engine_on(session, tokenizer_folder, **change)
    assert engine.generate("abcabc", max_tokens=50).stats.guessed_tokens == 0
    assert [len(step) for step in session.steps] == [6, *[1] * 49]


def test_concatenated_caches_are_not_exact_under_cuts() -> None:
    described = manifest()
    assert described.exact_under_cuts
    concatenated = dataclasses.replace(described.model, cache_layout="concatenated")
    assert not dataclasses.replace(described, model=concatenated).exact_under_cuts


# ---- Real bundles

BUNDLES = ["int8 cache", "float32 cache", "stories260k"]


FEW_TOKENS = {token: -math.inf for token in range(257) if token not in (97, 98, 99)}
REAL_SETTINGS: list[dict[str, Any]] = [
    {},
    {"logprobs": 1},
    {"temperature": 0.4, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2, "logprobs": 0},
    {"repetition_penalty": 1.05},
    {"stop": ["e"], "min_tokens": 30},
    # A random model repeats itself if it has few tokens to choose from.
    {"logit_bias": FEW_TOKENS},
    {"logit_bias": FEW_TOKENS, "temperature": 2.0, "seed": 3},
]


@pytest.mark.parametrize("name", BUNDLES)
@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_models_answer_the_same(engine_of: Callable[[str], Engine], name: str, data: st.DataObject) -> None:
    """Repetitive prompts of many lengths, one after another on one cache; one stream is closed early."""
    engine = engine_of(name)
    start, size = data.draw(st.integers(0, 500), label="start"), data.draw(st.integers(4, 120), label="size")
    words = engine.encode(TEXT[start : start + 700])[:size]
    prompt = (words * 3)[: data.draw(st.integers(1, 2 * size), label="prompt")]
    chosen = data.draw(st.sampled_from(REAL_SETTINGS), label="settings")
    max_tokens = data.draw(st.integers(30, 80), label="max_tokens")
    if data.draw(st.booleans(), label="leave another one early"):
        stream = engine.stream(token_ids=prompt[: size // 2 + 1], max_tokens=40)
        for _ in zip(range(data.draw(st.integers(1, 20), label="chunks")), stream, strict=False):
            pass
        stream.close()
    drafting = engine.generate(token_ids=prompt, max_tokens=max_tokens, **chosen)
    plain = engine.generate(token_ids=prompt, max_tokens=max_tokens, lookup=False, **chosen)
    assert answer(drafting) == answer(plain)


@pytest.mark.parametrize("name", BUNDLES)
def test_models_accept_drafts(engine_of: Callable[[str], Engine], name: str) -> None:
    """Otherwise the test above would compare plain decoding with itself."""
    engine = engine_of(name)
    stats = engine.generate(TEXT[:100], max_tokens=100, min_tokens=100, logit_bias=FEW_TOKENS).stats
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
