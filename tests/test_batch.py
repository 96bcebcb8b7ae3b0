"""Several prompts at once: the batch loop on a fake, and batches of real bundles against each prompt alone."""

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
from edgelm.runtime.decoding.decoder import Decoder
from edgelm.runtime.decoding.row import Greedy, Row
from edgelm.runtime.errors import (
    ContextLengthError,
    EdgelmError,
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
from edgelm.runtime.sessions.protocol import Capabilities, Rows
from edgelm.runtime.sessions.rows import OrtRows

from .test_decode import expected, rule

LETTERS = 5


class FakeRows(FakeSession):
    """A `FakeSession` for each row; row 0 is this object."""

    def __init__(self, max_rows: int, piece_tokens: int = 4) -> None:
        super().__init__(LETTERS, rule(LETTERS))
        self.max_rows = max_rows
        self.rows: list[FakeSession] = [self, *(FakeSession(LETTERS, rule(LETTERS)) for _ in range(max_rows - 1))]
        self.capabilities = Capabilities(piece_tokens, rows=self.several)
        self.together: list[int] = []
        self.pieces: list[int] = []

    @property
    def several(self) -> Rows:
        return FakeSeveral(self)


class FakeSeveral:
    """`Rows` of a `FakeRows`."""

    def __init__(self, session: FakeRows) -> None:
        self._session = session
        self._rows = session.rows

    @property
    def max_rows(self) -> int:
        return self._session.max_rows

    def length(self, row: int) -> int:
        return self._rows[row].length

    def can_rewind(self, row: int, length: int) -> bool:
        return self._rows[row].can_rewind(length)

    def rewind(self, row: int, length: int) -> None:
        self._rows[row].rewind(length)

    def copy(self, row: int, target: int, length: int) -> None:
        self._rows[target].tokens = self._rows[row].tokens[:length]

    def swap(self, row: int, other: int) -> None:
        rows = self._rows
        rows[row].tokens, rows[other].tokens = rows[other].tokens, rows[row].tokens

    def expect(self, rows: int, positions: int) -> None:
        for row in self._rows[rows:]:
            row.tokens = []

    def has_room(self, rows: int, positions: int) -> bool:
        return True

    def feed(self, row: int, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        self._session.pieces.append(len(token_ids))
        return self._rows[row].step(token_ids, keep)

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._session.together.append(len(token_ids))
        used = self._rows[: len(token_ids)]
        return np.concatenate([row.step([token]) for row, token in zip(used, token_ids, strict=True)])


def decoded(
    session: FakeRows, rows: Sequence[Row], context_length: int = 100
) -> Iterator[tuple[Row, int | EdgelmError | None]]:
    """The events of rows that are admitted as soon as there is room."""
    decoder, waiting = Decoder(session, context_length, max_rows=session.max_rows), list(rows)
    while waiting or decoder.rows:
        if waiting and decoder.has_place(len(waiting[0].known)):
            decoder.admit(waiting.pop(0))
        else:
            yield from decoder.advance()


# ---- the decoder

texts = st.tuples(
    st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=9),
    st.integers(1, 7),
    st.sets(st.integers(0, LETTERS - 1), max_size=1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=9), st.integers(2, 4), st.integers(1, 5))
def test_every_row_gets_the_tokens_that_it_gets_alone(
    asked: list[tuple[list[int], int, set[int]]], max_rows: int, piece_tokens: int
) -> None:
    session = FakeRows(max_rows, piece_tokens)
    rows = [Row(prompt, max_tokens, Greedy(), stop_ids) for prompt, max_tokens, stop_ids in asked]
    got: dict[Row, list[int]] = {row: [] for row in rows}
    left = []
    for row, token in decoded(session, rows):
        assert row not in left
        if token is None:
            left.append(row)
        else:
            assert isinstance(token, int)
            got[row].append(token)
    assert [got[row] for row in rows] == [expected(*text, rule(LETTERS)) for text in asked]
    assert len(left) == len(rows)
    assert max(session.pieces, default=0) <= piece_tokens
    # Nothing is computed twice: prompt tokens that are not reused and chosen tokens before the last are fed once.
    prompts = sum(len(row.token_ids) - row.reused for row in rows)
    assert sum(session.together) + sum(session.pieces) == prompts + sum(len(tokens) - 1 for tokens in got.values())


def test_a_row_that_leaves_is_replaced_before_the_next_step() -> None:
    session = FakeRows(3)
    rows = [Row([index], count, Greedy()) for index, count in enumerate((2, 9, 2, 5, 5))]
    assert all(row.chosen == row.max_tokens for row, token in decoded(session, rows) if token is None)
    assert max(session.together) == 3
    assert sum(session.together) + sum(session.pieces) == 2 + 9 + 2 + 5 + 5
    assert len(session.together) <= 9


def test_a_common_prefix_is_fed_once() -> None:
    session = FakeRows(6, 9)
    prompts = [[1, 2, 3, 4], [1, 2, 3, 0, 1], [2, 2], [1, 2, 3, 4], [1, 2, 3, 0, 1, 1]]
    rows = [Row(prompt, 4, Greedy()) for prompt in prompts]
    got: dict[Row, list[int]] = {row: [] for row in rows}
    for row, token in decoded(session, rows):
        got[row] += [token] if isinstance(token, int) else []
    assert [got[row] for row in rows] == [expected(prompt, 4, set(), rule(LETTERS)) for prompt in prompts]
    # Short prompts are fed first. The last token of each has to run.
    assert [row.reused for row in rows] == [0, 3, 0, 3, 5]


def test_a_row_can_be_ended_from_outside() -> None:
    session = FakeRows(2)
    rows = [Row([index], 20, Greedy()) for index in range(3)]
    got: dict[Row, int] = dict.fromkeys(rows, 0)
    for row, token in decoded(session, rows):
        got[row] += token is not None
        row.ended = row is rows[0] and got[row] == 4
    assert list(got.values()) == [4, 20, 20]


@pytest.mark.parametrize("keep", [0, 2, 6])
@pytest.mark.parametrize("others", [0, 1])
def test_a_context_that_slides_at_every_token_needs_no_deep_stack(keep: int, others: int) -> None:
    rows = [Row([1, 2], 3000, Greedy(), keep=keep), *(Row([3], 50, Greedy()) for _ in range(others))]
    got: dict[Row, list[int]] = {row: [] for row in rows}
    for row, token in decoded(FakeRows(2), rows, 7):
        got[row] += [token] if isinstance(token, int) else []
    assert len(got[rows[0]]) == 3000
    if others:
        assert got[rows[1]] == expected([3], 50, set(), rule(LETTERS))


def test_a_long_prompt_is_fed_between_the_steps_of_others() -> None:
    """No row waits for more than one piece before its next token."""
    session = FakeRows(3, 4)
    short, long = Row([1], 60, Greedy()), Row([2] * 100, 3, Greedy())
    order = [row is short for row, token in decoded(session, [short, long]) if isinstance(token, int)]
    assert order.index(False) >= 100 // 4 - 1


def test_a_short_prompt_overtakes_a_long_one_four_times_at_most() -> None:
    session = FakeRows(8, 4)
    rows = [Row([1] * 40, 1, Greedy()), *(Row([index % LETTERS, 0, 1, 2], 1, Greedy()) for index in range(1, 8))]
    ended = [row for row, token in decoded(session, rows) if token is None]
    assert ended.index(rows[0]) == 4


def test_a_failing_row_harms_no_other() -> None:
    class Refusing(Greedy):
        def choose(self, logits: NDArray[np.float32]) -> int:
            raise SettingsError("no token is left")

    rows = [Row([1], 5, Greedy()), Row([2], 5, Refusing()), Row([3], 5, Greedy())]
    events = list(decoded(FakeRows(3), rows))
    assert [row for row, event in events if isinstance(event, SettingsError)] == [rows[1]]
    for row in (rows[0], rows[2]):
        tokens = [event for one, event in events if one is row and isinstance(event, int)]
        assert tokens == expected(row.token_ids, 5, set(), rule(LETTERS))


# ---- real bundles


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if rows are computed together."""
    refuse_rows(monkeypatch)


def refuse_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtRows, "step", lambda self, ids: pytest.fail("rows were computed together"))


@pytest.fixture
def engine(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("int8 cache")


def facts(done: Completion) -> tuple[Any, ...]:
    """Everything in an answer except times."""
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


# Lengths around the limits: one token, a piece of 256, the context of 512.
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
    """Beside rows of other lengths, after rows that left, and after the buffers grew."""
    engine = engine_of(name)
    alone = engine._session
    assert isinstance(alone, OrtSession)
    rows = alone.rows()
    texts = [ids_of(engine, length, length) for length in (200, 3, 250, 31)]
    follow = ids_of(engine, 30, 0)
    for index, ids in enumerate(texts):
        rows.feed(index, ids)
    first = [rows.step([token] * 4).copy() for token in follow[:10]]
    rows.copy(3, 1, rows.length(3))
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
    # The first one may find a token that an earlier test left.
    first, *others = sorted(done.stats.reused_tokens for done in together[:3])
    assert first < 270 and others == [270, 270]


@EXACT
def test_one_call_of_the_graph_serves_all_rows(
    engine_of: Callable[[str], Engine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(name)
    steps: list[int] = []
    step = OrtRows.step
    monkeypatch.setattr(OrtRows, "step", lambda self, ids: (steps.append(len(ids)), step(self, ids))[1])
    engine.generate_batch([[1, 2, index] for index in range(8)], max_tokens=6, logit_bias={256: -math.inf})
    assert steps == [8] * 5


@pytest.mark.parametrize(
    ("switch", "settings"),
    [("off", {"kv": "float32"}), ("on", {"kv": "float32", "scheme": "fp32"}), ("on", {"scheme": "int8-tensor"})],
)
def test_bundles_that_are_not_exact_in_a_batch_answer_one_by_one(
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
def test_invalid_requests_are_refused_before_anything_is_computed(
    engine: Engine, prompts: Any, keywords: Any, error: type[InputError], text: str
) -> None:
    with pytest.raises(error, match=text):
        engine.generate_batch(prompts, **keywords)
    with pytest.raises(error, match=text):
        engine.stream_batch(prompts, **keywords)


def test_a_step_that_fails_ends_the_batch_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OrtRows, token_ids: Sequence[int]) -> NDArray[np.float32]:
        raise SessionError("the step failed")

    with monkeypatch.context() as patch:
        patch.setattr(OrtRows, "step", fail)
        with pytest.raises(SessionError, match="the step failed"):
            engine.generate_batch(["a", "b"], max_tokens=4)
    assert len(engine.generate_batch(["a", "b"], max_tokens=4)) == 2


def test_errors_of_onnxruntime_are_mapped(engine: Engine) -> None:
    session = engine._session
    assert isinstance(session, OrtSession)
    rows = session.rows()
    with pytest.raises(SessionError, match="a step of 1 tokens at position 0 failed"):
        rows.feed(0, [10**9])
    rows.feed(1, [1])
    with pytest.raises(SessionError, match="a step of 2 rows, 1 token each, failed"):
        rows.step([1, 10**9])
    assert (rows.length(0), rows.length(1)) == (0, 1)


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
    assert engine._scheduler.counts() == (2, 0)
    assert len(engine.generate_batch(["c"])) == 1, "abandoned rows block nothing"
    stream.close()
    assert engine._scheduler.counts() == (0, 0)


def test_a_batch_leaves_the_conversations_cache_alone(engine: Engine) -> None:
    with load(engine.bundle.path, threads=1, response_cache=False) as fresh:
        ids = ids_of(fresh, 40, 1)
        fresh.generate(token_ids=ids, max_tokens=1)
        fresh.generate_batch(["x", "y"], max_tokens=3)
        assert fresh.generate(token_ids=ids, max_tokens=1).stats.reused_tokens == 32, "two blocks of the prefix cache"


def test_deadlines_are_each_rows_own(engine: Engine) -> None:
    each = [GenerationSettings(max_tokens=3), GenerationSettings(max_tokens=400, timeout=1e-6, context_full="slide")]
    fine, late = engine.generate_batch(["a", "b"], settings=each)
    assert (late.finish_reason, late.text, late.token_ids) == ("deadline", "", ())
    assert fine.finish_reason != "deadline"


def test_a_deadline_ends_a_row_with_a_partial_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.perf_counter
    step, late = OrtRows.step, []

    def slow(self: OrtRows, ids: Sequence[int]) -> NDArray[np.float32]:
        late.append(0)
        return step(self, ids)

    monkeypatch.setattr(OrtRows, "step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * (len(late) >= 3))
    each = [
        GenerationSettings(max_tokens=30, timeout=500, logit_bias={256: -math.inf}),
        GenerationSettings(max_tokens=30, logit_bias={256: -math.inf}),
    ]
    short, full = engine.generate_batch(["a", "b"], settings=each)
    assert (short.finish_reason, len(short.token_ids)) == ("deadline", 4)
    assert (full.finish_reason, len(full.token_ids)) == ("length", 30)
    assert full.token_ids == engine.generate("b", settings=each[1]).token_ids


def test_requests_that_never_get_a_row_in_time_are_unanswered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._scheduler._decoder, "max_rows", 1)
    stream = engine.stream("Once", max_tokens=10**9, context_full="slide")
    next(stream)
    got = engine.generate_batch(["a", "b"], timeout=0.05)
    assert engine._scheduler.counts() == (1, 0)
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
