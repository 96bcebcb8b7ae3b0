"""Several prompts at once: the rows' loop on a fake, and batches of real bundles against each prompt alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Completion, Engine, GenerationSettings, load
from edgelm.runtime.decoding.batch import Batch, Row
from edgelm.runtime.decoding.sequence import Greedy
from edgelm.runtime.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineClosedError,
    InputError,
    PromptError,
    SessionError,
    SettingsError,
    TemplateError,
)
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.rows import OrtRowsSession

from .test_decode import expected, rule

LETTERS = 5


class FakeRows:
    """A `FakeSession` for each row."""

    def __init__(self, max_rows: int, piece_tokens: int = 4) -> None:
        self.max_rows = max_rows
        self.piece_tokens = piece_tokens
        self.rows: list[FakeSession] = []
        self.steps: list[int] = []
        self.pieces: list[int] = []

    def add(self) -> None:
        assert len(self.rows) < self.max_rows
        self.rows.append(FakeSession(LETTERS, rule(LETTERS)))

    def copy(self, row: int, target: int, length: int) -> None:
        assert self.rows[target].tokens == []
        self.rows[target].tokens = self.rows[row].tokens[:length]

    def remove(self, row: int) -> None:
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last

    def rewind(self, row: int, length: int) -> None:
        self.rows[row].rewind(length)

    def feed(self, row: int, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self.pieces.append(len(token_ids))
        return self.rows[row].step(token_ids)[0]

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self.steps.append(len(token_ids))
        return np.concatenate([row.step([token]) for row, token in zip(self.rows, token_ids, strict=True)])


# ---- the rows' loop

texts = st.tuples(
    st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=9),
    st.integers(1, 7),
    st.sets(st.integers(0, LETTERS - 1), max_size=1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=9), st.integers(1, 4), st.integers(1, 5))
def test_every_row_gets_the_tokens_that_it_gets_alone(
    asked: list[tuple[list[int], int, set[int]]], max_rows: int, piece_tokens: int
) -> None:
    session = FakeRows(max_rows, piece_tokens)
    rows = [Row(prompt, max_tokens, Greedy(), stop_ids) for prompt, max_tokens, stop_ids in asked]
    got: dict[Row, list[int]] = {row: [] for row in rows}
    left = []
    for row, token in Batch(session, rows, 100).tokens():
        assert row not in left
        if token is None:
            left.append(row)
        else:
            got[row].append(token)
    assert [got[row] for row in rows] == [expected(*text, rule(LETTERS)) for text in asked]
    assert len(left) == len(rows)
    assert session.rows == []
    assert max(session.pieces, default=0) <= piece_tokens
    # Each token but a row's first and last is fed in a common step: nothing is computed twice, and nothing in vain.
    assert sum(session.steps) == sum(len(tokens) - 1 for tokens in got.values())
    assert sum(session.pieces) == sum(len(row.token_ids) - row.reused for row in rows)


def test_a_row_that_leaves_is_replaced_before_the_next_step() -> None:
    session = FakeRows(3)
    rows = [Row([index], count, Greedy(), ()) for index, count in enumerate((2, 9, 2, 5, 5))]
    list(Batch(session, rows, 100).tokens())
    assert session.steps[:5] == [3, 3, 3, 3, 3]
    assert sum(session.steps) == 2 + 9 + 2 + 5 + 5 - len(rows)


def test_what_prompts_have_in_common_is_fed_once() -> None:
    session = FakeRows(3)
    prompts = [[1, 2, 3, 4], [1, 2, 3, 0, 1], [2, 2], [1, 2, 3, 4], [1, 2, 3, 0, 1, 1]]
    rows = [Row(prompt, 4, Greedy(), ()) for prompt in prompts]
    got: dict[Row, list[int]] = {row: [] for row in rows}
    for row, token in Batch(session, rows, 100).tokens():
        got[row] += [] if token is None else [token]
    assert [got[row] for row in rows] == [expected(prompt, 4, set(), rule(LETTERS)) for prompt in prompts]
    assert [row.reused for row in rows] == [0, 3, 0, 0, 3]
    assert session.pieces == [4, 2, 2, 4, 3]


def test_a_row_can_be_ended_from_outside() -> None:
    session = FakeRows(2)
    rows = [Row([index], 20, Greedy(), ()) for index in range(3)]
    got: dict[Row, int] = dict.fromkeys(rows, 0)
    for row, token in Batch(session, rows, 100).tokens():
        got[row] += token is not None
        row.ended = row is rows[0] and got[row] == 4
    assert list(got.values()) == [4, 20, 20]


def test_rows_are_made_only_when_there_is_a_place_for_them() -> None:
    made = []

    def rows() -> Iterator[Row]:
        for index in range(5):
            made.append(index)
            yield Row([index % LETTERS], 3, Greedy(), ())

    tokens = Batch(FakeRows(2), rows(), 100).tokens()
    next(tokens)
    assert made == [0]
    list(tokens)
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 2, 6])
def test_a_context_that_slides_at_every_token_needs_no_deep_stack(keep: int) -> None:
    session = FakeRows(2)
    row = Row([1, 2], 3000, Greedy(), (), keep=keep)
    assert sum(token is not None for _, token in Batch(session, [row], 7).tokens()) == 3000


# ---- real bundles


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail where rows are computed together."""
    refuse_rows(monkeypatch)


def refuse_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtSession, "rows", lambda self, count: pytest.fail("a batch was begun"))


@pytest.fixture
def engine(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("int8 cache")


def facts(done: Completion) -> tuple[Any, ...]:
    """All of an answer but the times."""
    return done.text, done.token_ids, done.finish_reason, done.logprobs, done.stats.generated_tokens


@st.composite
def some_settings(draw: st.DrawFn) -> GenerationSettings:
    chosen: dict[str, Any] = {"max_tokens": draw(st.integers(1, 24)), "logprobs": draw(st.sampled_from([None, 2]))}
    if draw(st.booleans()):
        chosen |= {"temperature": draw(st.sampled_from([0.6, 1.5])), "seed": draw(st.integers(0, 3))}
        chosen |= draw(st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]))
    chosen |= draw(st.sampled_from([{}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}]))
    chosen |= draw(st.sampled_from([{}, {"stop": ("e", "th")}, {"stop_token_ids": (7, 77, 177)}, {"min_tokens": 1}]))
    chosen |= draw(st.sampled_from([{}, {"context_full": "slide"}, {"context_full": "slide", "keep": 3}]))
    return GenerationSettings(**chosen)


# Lengths around what matters: one token, a piece of 256 and one more, the context of 512 and what leaves little room.
lengths = st.one_of(st.integers(1, 40), st.sampled_from([1, 255, 256, 257, 300, 500, 511, 512]))
asked = st.lists(st.tuples(lengths, st.integers(0, 2**32), some_settings()), min_size=1, max_size=7)


def ids_of(engine: Engine, length: int, seed: int) -> list[int]:
    vocab_size = engine.bundle.manifest.model.vocab_size
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocab_size - 1, length)]


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("int8 cache", 15),
        ("stories260k", 6),
        ("float32 cache", 2),
        ("float32 cache, kernels", 15),
    ],
)
def test_a_batch_answers_as_each_prompt_alone(engine_of: Callable[[str], Engine], name: str, examples: int) -> None:
    engine = engine_of(name)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(asked, st.integers(1, 5))
    def check(rows: list[tuple[int, int, GenerationSettings]], max_rows: int) -> None:
        prompts = [ids_of(engine, length, seed) for length, seed, _ in rows]
        each = [setting for _, _, setting in rows]
        together = engine.generate_batch(prompts, settings=each, max_rows=max_rows)
        alone = [engine.generate(token_ids=ids, settings=one) for ids, one in zip(prompts, each, strict=True)]
        assert [facts(done) for done in together] == [facts(done) for done in alone]

    check()


EXACT = pytest.mark.parametrize("name", ["int8 cache", "float32 cache, kernels"])


@EXACT
def test_logits_of_a_row_are_bit_for_bit_those_alone(engine_of: Callable[[str], Engine], name: str) -> None:
    """Beside rows of other lengths, behind rows that left, and after the buffers grew."""
    engine = engine_of(name)
    alone = engine._session
    assert isinstance(alone, OrtSession)
    rows = alone.rows(4)
    texts = [ids_of(engine, length, length) for length in (200, 3, 250, 31)]
    follow = ids_of(engine, 30, 0)
    for index, ids in enumerate(texts):
        rows.add()
        rows.feed(index, ids)
    first = [rows.step([token] * 4).copy() for token in follow[:10]]
    rows.remove(1)
    texts_then = [texts[0], texts[3], texts[2]]
    second = [rows.step([token] * 3).copy() for token in follow[10:]]
    assert rows.cache.capacity > 256
    rows.cache.check()
    for index, ids in enumerate(texts):
        alone.rewind(0)
        alone.step(ids)
        assert all((alone.step([token])[0] == got[index]).all() for token, got in zip(follow[:10], first, strict=True))
        if ids in texts_then:
            place = texts_then.index(ids)
            for token, got in zip(follow[10:], second, strict=True):
                assert (alone.step([token])[0] == got[place]).all()


def test_prompts_with_a_beginning_in_common_answer_as_alone(engine: Engine) -> None:
    common = ids_of(engine, 270, 1)
    prompts = [[*common, *ids_of(engine, length, length)] for length in (1, 30, 2, 60)]
    together = engine.generate_batch(prompts, max_tokens=20, logprobs=2, max_rows=3)
    assert [facts(done) for done in together] == [
        facts(engine.generate(token_ids=ids, max_tokens=20, logprobs=2)) for ids in prompts
    ]
    assert [done.stats.reused_tokens for done in together[:3]] == [0, 270, 270]


@EXACT
def test_one_call_of_the_graph_serves_all_rows(
    engine_of: Callable[[str], Engine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(name)
    steps: list[int] = []
    step = OrtRowsSession.step
    monkeypatch.setattr(OrtRowsSession, "step", lambda self, ids: (steps.append(len(ids)), step(self, ids))[1])
    engine.generate_batch([[1, 2, index] for index in range(8)], max_tokens=6, logit_bias={256: -math.inf})
    assert steps == [8] * 5


@pytest.mark.parametrize(
    ("switch", "settings"),
    [("off", {"kv": "float32"}), ("on", {"kv": "float32", "scheme": "fp32"}), ("on", {"scheme": "int8-tensor"})],
)
def test_what_cannot_be_exact_in_a_batch_is_answered_one_by_one(
    export_tiny: Callable[..., Path], switch: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.SWITCH, switch)
    bundle = export_tiny(**settings)
    refuse_rows(monkeypatch)
    with load(bundle, threads=1, response_cache=False, prefix_cache=False) as engine:
        assert len(engine.generate_batch(["a", "b"], max_tokens=3)) == 2


def test_texts_messages_and_ids_in_one_batch(engine: Engine) -> None:
    done = engine.generate_batch(["Once", engine.encode("Once"), np.array(engine.encode("Once"))], max_tokens=5)
    assert len({facts(one) for one in done}) == 1
    with pytest.raises(TemplateError, match="prompt 1 of the batch: the bundle has no chat template"):
        engine.generate_batch(["a", [{"role": "user", "content": "b"}]])
    assert engine.generate_batch([]) == []


# ---- errors, before anything is computed


@pytest.mark.parametrize(
    ("prompts", "keywords", "error", "text"),
    [
        (["a", ""], {}, PromptError, "prompt 1 of the batch: the prompt is empty"),
        ([[]], {}, PromptError, "prompt 0 of the batch: the token_ids is empty"),
        (["a", "b", [1, 999]], {}, PromptError, "prompt 2 of the batch: token id 999"),
        ([[1] * 513], {}, ContextLengthError, "prompt 0 of the batch: the prompt has 513 tokens"),
        (["a", None], {}, PromptError, "prompt 1 of the batch"),
        (["a", 5], {}, PromptError, "prompt 1 of the batch"),
        ("abc", {}, PromptError, "must be a list"),
        (None, {}, PromptError, "must be a list"),
        (["a"], {"max_rows": 0}, SettingsError, "max_rows"),
        (["a"], {"max_rows": True}, SettingsError, "max_rows"),
        (["a"], {"max_rows": "8"}, SettingsError, "max_rows"),
        (["a"], {"temperature": -1}, SettingsError, "temperature"),
        (["a"], {"settings": []}, SettingsError, "0 settings for 1 prompts"),
        (["a"], {"settings": [5]}, SettingsError, "prompt 0 of the batch: settings must be"),
        (["a"], {"settings": 5}, SettingsError, "settings must be"),
        (["a"], {"stop_token_ids": [300]}, SettingsError, "prompt 0 of the batch: stop_token_ids"),
    ],
)
@pytest.mark.usefixtures("no_rows")
def test_what_is_wrong_is_said_before_anything_is_computed(
    engine: Engine, prompts: Any, keywords: Any, error: type[InputError], text: str
) -> None:
    with pytest.raises(error, match=text):
        engine.generate_batch(prompts, **keywords)
    with pytest.raises(error, match=text):
        engine.stream_batch(prompts, **keywords)


def test_a_step_that_fails_ends_the_batch_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OrtRowsSession, token_ids: Sequence[int]) -> NDArray[np.float32]:
        raise SessionError("the step failed")

    with monkeypatch.context() as patch:
        patch.setattr(OrtRowsSession, "step", fail)
        with pytest.raises(SessionError, match="the step failed"):
            engine.generate_batch(["a", "b"], max_tokens=4)
    assert len(engine.generate_batch(["a", "b"], max_tokens=4)) == 2


def test_onnxruntimes_errors_are_mapped(engine: Engine) -> None:
    session = engine._session
    assert isinstance(session, OrtSession)
    rows = session.rows(1)
    rows.add()
    with pytest.raises(SessionError, match="1 rows, 1 tokens each, failed"):
        rows.feed(0, [10**9])


# ---- streams, turns, deadlines


def test_a_stream_gives_the_same_in_chunks(engine: Engine) -> None:
    prompts = ["Once upon", "b", "The"]
    texts, last = ["", "", ""], {}
    for index, chunk in engine.stream_batch(prompts, max_tokens=9, max_rows=2):
        assert index not in last
        texts[index] += chunk.text
        if chunk.finish_reason is not None:
            last[index] = chunk
    assert texts == [engine.generate(prompt, max_tokens=9).text for prompt in prompts]
    assert len(last) == 3


def test_leaving_a_stream_frees_the_engine(engine: Engine) -> None:
    stream = engine.stream_batch(["Once", "b"], max_tokens=50)
    next(stream)
    with pytest.raises(EngineBusyError):
        engine.generate_batch(["c"])
    stream.close()
    assert engine.generate("c", max_tokens=1).stats.generated_tokens <= 1


def test_a_batch_leaves_the_conversations_cache_alone(engine: Engine) -> None:
    engine.generate("Once upon a time", max_tokens=1)
    engine.generate_batch(["x", "y"], max_tokens=3)
    assert engine.generate("Once upon a time", max_tokens=1).stats.reused_tokens > 0


def test_deadlines_are_each_rows_own(engine: Engine) -> None:
    each = [GenerationSettings(max_tokens=3), GenerationSettings(max_tokens=400, timeout=1e-6, context_full="slide")]
    fine, late = engine.generate_batch(["a", "b"], settings=each)
    assert (late.finish_reason, late.text, late.token_ids) == ("deadline", "", ())
    assert fine.finish_reason != "deadline"


def test_a_deadline_ends_a_row_with_what_is_there(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.perf_counter
    step, late = OrtRowsSession.step, []

    def slow(self: OrtRowsSession, ids: Sequence[int]) -> NDArray[np.float32]:
        late.append(0)
        return step(self, ids)

    monkeypatch.setattr(OrtRowsSession, "step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * (len(late) >= 3))
    each = [
        GenerationSettings(max_tokens=30, timeout=500, logit_bias={256: -math.inf}),
        GenerationSettings(max_tokens=30, logit_bias={256: -math.inf}),
    ]
    short, full = engine.generate_batch(["a", "b"], settings=each)
    assert (short.finish_reason, len(short.token_ids)) == ("deadline", 4)
    assert (full.finish_reason, len(full.token_ids)) == ("length", 30)
    assert full.token_ids == engine.generate("b", settings=each[1]).token_ids


def test_a_batch_whose_turn_does_not_come_in_time_is_unanswered(engine: Engine) -> None:
    stream = engine.stream("Once", max_tokens=50)
    next(stream)
    got: list[Completion] = []
    thread = threading.Thread(target=lambda: got.extend(engine.generate_batch(["a", "b"], timeout=0.05)))
    thread.start()
    thread.join()
    stream.close()
    assert [done.finish_reason for done in got] == ["deadline", "deadline"]


def test_threads_share_an_engine(engine: Engine) -> None:
    alone = {prompt: facts(engine.generate(prompt, max_tokens=12)) for prompt in "abcdef"}
    failures: list[Any] = []

    def ask(prompts: str) -> None:
        for done, prompt in zip(engine.generate_batch(list(prompts), max_tokens=12, max_rows=2), prompts, strict=True):
            if facts(done) != alone[prompt]:
                failures.append(prompt)
        if facts(engine.generate(prompts[0], max_tokens=12)) != alone[prompts[0]]:
            failures.append(prompts)

    threads = [threading.Thread(target=ask, args=(prompts,)) for prompts in ("abc", "def", "fedcba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_closed_engine_says_so(tiny_bundle: Path) -> None:
    engine = load(tiny_bundle, threads=1, response_cache=False)
    stream = engine.stream_batch(["a"])
    engine.close()
    with pytest.raises(EngineClosedError):
        next(stream)
    with pytest.raises(EngineClosedError):
        engine.generate_batch(["a"])


# ---- the response cache


def test_answers_are_kept_and_given_again(tiny_bundle: Path) -> None:
    with load(tiny_bundle, threads=1) as engine:
        engine.generate("b", max_tokens=6)
        first = engine.generate_batch(["a", "b", "c", "a"], max_tokens=6)
        assert [done.stats.response_cache_hit for done in first] == [False, True, False, True]
        again = engine.generate_batch(["a", "b", "c", "a"], max_tokens=6)
        assert all(done.stats.response_cache_hit for done in again)
        assert [facts(done) for done in first] == [facts(done) for done in again]
        assert engine.generate("c", max_tokens=6).stats.response_cache_hit
        drawn = engine.generate_batch(["a", "a"], max_tokens=6, temperature=1.0, seed=1)
        assert not any(done.stats.response_cache_hit for done in drawn)


def test_of_equal_requests_one_that_ran_out_of_time_does_not_answer_the_others(tiny_bundle: Path) -> None:
    with load(tiny_bundle, threads=1) as engine:
        each = [GenerationSettings(max_tokens=5, timeout=1e-6), *[GenerationSettings(max_tokens=5)] * 2]
        late, *fine = engine.generate_batch(["a", "a", "a"], settings=each)
        assert late.finish_reason == "deadline"
        assert {facts(done) for done in fine} == {facts(engine.generate("a", max_tokens=5))}
        assert fine[0].finish_reason != "deadline"
