"""From token ids to token ids and chunks: `Sequencer` and `Engine` on a session that computes by a rule.

The rule of most tests depends on every token so far, so any mistake with the cache changes the answer.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Bundle, Chunk, Completion, Engine
from edgelm.runtime.bundle.manifest import (
    CacheType,
    FileEntry,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Source,
    Target,
    Tokens,
)
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.decoding.decoder import Decoder
from edgelm.runtime.decoding.row import Greedy, Row
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineClosedError,
    PromptError,
    SessionError,
    SettingsError,
    TemplateError,
)
from edgelm.runtime.fake import FakeSession, NextToken
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import byte_tokenizer

END = 256
LETTERS = 4


def rule(vocab_size: int) -> NextToken:
    """A next token that depends on every token so far and on their order."""

    def next_token(tokens: Sequence[int]) -> int:
        value = 7
        for token in tokens:
            value = (value * 31 + token + 1) % 1_000_003
        return value % vocab_size

    return next_token


def expected(prompt: Sequence[int], max_tokens: int, stop_ids: set[int], next_token: NextToken) -> list[int]:
    """The tokens of greedy decoding without a cache."""
    known = list(prompt)
    for _ in range(max_tokens):
        known.append(next_token(known))
        if known[-1] in stop_ids:
            break
    return known[len(prompt) :]


class FailingSession(FakeSession):
    """Raises at the step numbers in `fail_at`, counted from 0 over its lifetime, before any change."""

    def __init__(self, vocab_size: int, next_token: NextToken, fail_at: set[int]) -> None:
        super().__init__(vocab_size, next_token)
        self.fail_at = fail_at
        self.calls = 0

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        self.calls += 1
        if self.calls - 1 in self.fail_at:
            raise SessionError("the step failed")
        return super().step(token_ids, keep)


# ---- Sequencer

prompts = st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=9)
requests = st.lists(
    st.tuples(prompts, st.integers(1, 6), st.sets(st.integers(0, LETTERS - 1), max_size=1)), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 5))
def test_reuse_changes_no_answer_and_feeds_only_what_is_new(
    asked: list[tuple[list[int], int, set[int]]], piece_tokens: int
) -> None:
    session = FakeSession(LETTERS, rule(LETTERS))
    sequencer = Sequencer(session, piece_tokens)
    cached: list[int] = []
    for prompt, max_tokens, stop_ids in asked:
        common = 0
        while common < min(len(cached), len(prompt) - 1) and cached[common] == prompt[common]:
            common += 1
        assert sequencer.reusable(prompt) == common
        session.steps.clear()
        answer = list(sequencer.greedy(prompt, max_tokens, stop_ids))
        assert answer == expected(prompt, max_tokens, stop_ids, rule(LETTERS))
        assert [token for step in session.steps for token in step] == [*prompt[common:], *answer[:-1]]
        pieces = -(-(len(prompt) - common) // piece_tokens)
        assert len(session.steps) == pieces + len(answer) - 1
        assert all(len(step) <= piece_tokens for step in session.steps)
        cached = [*prompt, *answer[:-1]]
        assert session.tokens == cached


def test_the_default_piece_bounds_every_step() -> None:
    session = FakeSession(LETTERS, rule(LETTERS))
    prompt = [index * 7 % LETTERS for index in range(1000)]
    list(Sequencer(session).greedy(prompt, 1, ()))
    assert session.tokens == prompt
    assert max(map(len, session.steps)) <= 256


def test_a_prompt_that_is_wholly_cached_runs_its_last_token_again() -> None:
    session = FakeSession(LETTERS, rule(LETTERS))
    sequencer = Sequencer(session)
    first = list(sequencer.greedy([0, 1, 2, 3], 1, ()))
    session.steps.clear()
    assert list(sequencer.greedy([0, 1, 2, 3], 1, ())) == first
    assert session.steps == [[3]]
    session.steps.clear()
    assert list(sequencer.greedy([0, 1], 1, ())) == expected([0, 1], 1, set(), rule(LETTERS))
    assert session.steps == [[1]]


@pytest.mark.parametrize("stop", range(6))
def test_a_stop_id_ends_the_answer_and_is_its_last_token(stop: int) -> None:
    answer = list(Sequencer(FakeSession(6, lambda tokens: len(tokens) % 6)).greedy([0], 20, {stop}))
    assert answer == [*range(1, 6), *range(6)][: (stop - 1) % 6 + 1]


def test_the_lowest_id_wins_among_equals() -> None:
    class Ties(FakeSession):
        def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
            logits = super().step(token_ids, keep)
            logits[:, [2, 5]] = 3.0
            return logits

    assert list(Sequencer(Ties(8, lambda _: 0)).greedy([1], 3, ())) == [2, 2, 2]


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 4), st.sets(st.integers(0, 25), min_size=1, max_size=4))
def test_a_step_that_fails_leaves_a_sequencer_that_answers_right(
    asked: list[tuple[list[int], int, set[int]]], piece_tokens: int, fail_at: set[int]
) -> None:
    session = FailingSession(LETTERS, rule(LETTERS), fail_at)
    sequencer = Sequencer(session, piece_tokens)
    for prompt, max_tokens, stop_ids in asked:
        answer = None
        for _ in range(len(fail_at) + 1):
            try:
                answer = list(sequencer.greedy(prompt, max_tokens, stop_ids))
            except SessionError:
                continue
            break
        assert answer == expected(prompt, max_tokens, stop_ids, rule(LETTERS))
        assert session.tokens == [*prompt, *answer[:-1]]


def test_what_ran_before_a_failure_is_reused() -> None:
    session = FailingSession(LETTERS, rule(LETTERS), {2})
    sequencer = Sequencer(session, 2)
    with pytest.raises(SessionError):
        list(sequencer.greedy([0, 1, 2, 3, 0, 1], 1, ()))
    assert session.tokens == [0, 1, 2, 3]
    session.steps.clear()
    list(sequencer.greedy([0, 1, 2, 3, 0, 1], 1, ()))
    assert session.steps == [[0, 1]]


@settings(max_examples=100, deadline=None)
@given(prompts, prompts, st.integers(0, 12), st.integers(1, 3))
def test_cancelling_anywhere_keeps_what_ran(first: list[int], second: list[int], taken: int, piece_tokens: int) -> None:
    session = FakeSession(LETTERS, rule(LETTERS))
    sequencer = Sequencer(session, piece_tokens)
    stream = sequencer.greedy(first, 10, ())
    for _ in range(taken):
        next(stream, None)
    stream.close()  # type: ignore[attr-defined]
    kept = list(session.tokens)
    assert kept == [*first, *expected(first, 10, set(), rule(LETTERS))][: len(kept)]
    common = sequencer.reusable(second)
    session.steps.clear()
    assert list(sequencer.greedy(second, 5, ())) == expected(second, 5, set(), rule(LETTERS))
    assert second[:common] == kept[:common]
    assert [token for step in session.steps for token in step][: len(second) - common] == second[common:]


def test_cancelling_inside_a_prompt_keeps_its_first_pieces() -> None:
    session = FakeSession(LETTERS, rule(LETTERS))
    decoder, row = Decoder(session, piece_tokens=2), Row([0, 1, 2, 3, 0, 1], 5, Greedy())
    decoder.admit(row)
    assert list(decoder.advance()) == []
    decoder.drop(row)
    assert session.tokens == [0, 1]
    assert decoder.reusable([0, 1, 2, 3, 0, 1]) == 2


# ---- Engine


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder / "tokenizer.json")


def manifest(
    context_length: int = 64, eos: tuple[int, ...] = (END,), files: dict[str, FileEntry] | None = None
) -> Manifest:
    return Manifest(
        schema_version=1,
        name="fake",
        source=Source("fake", None, "FakeForCausalLM", None),
        target=Target("x86-cpu", {}),
        compression=(),
        quantization=Quantization("int8-rowwise", ()),
        model=Model(END + 1, context_length, 0, (LayerCache(1, 1, 1, None),), CacheType("int8", "channel")),
        tokens=Tokens(None, eos, None),
        quality={},
        files=files or {},
        versions={},
    )


NewEngine = Callable[..., Engine]


@pytest.fixture
def new_engine(tokenizer: Tokenizer, tmp_path: Path) -> NewEngine:
    """Create an engine on a session; keyword arguments go to the manifest."""

    def make(session: FakeSession, responses: ResponseCache | None = None, **settings: Any) -> Engine:
        return Engine(Bundle(tmp_path, manifest(**settings)), session, tokenizer, responses)

    return make


def fake(next_token: NextToken | None = None) -> FakeSession:
    return FakeSession(END + 1, next_token or rule(END))


def saying(tokenizer: Tokenizer, prompt: str, text: str) -> FakeSession:
    """A session that answers the prompt with the text and the end token."""
    start, answer = len(tokenizer.encode(prompt)), tokenizer.encode(text)
    return fake(lambda tokens: answer[len(tokens) - start] if len(tokens) - start < len(answer) else END)


def test_an_answer_is_text_ids_reason_and_counts(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    text = "Héllo 😀, 你好!"
    session = saying(tokenizer, "abc", text)
    done = new_engine(session).generate("abc", max_tokens=60)
    assert done.text == text
    assert list(done.token_ids) == tokenizer.encode(text)
    assert done.finish_reason == "stop"
    assert done.stats.prompt_tokens == 3
    assert done.stats.reused_tokens == 0
    assert done.stats.generated_tokens == len(done.token_ids)
    assert not done.stats.response_cache_hit
    assert done.stats.resident_bytes > 0
    assert session.tokens == [*tokenizer.encode("abc"), *done.token_ids]


def test_a_stream_is_the_completion_in_pieces_of_whole_characters(new_engine: NewEngine, tokenizer: Tokenizer) -> None:
    text = "a😀b你"
    chunks = list(new_engine(saying(tokenizer, "p", text)).stream("p", max_tokens=30))
    assert [chunk.text for chunk in chunks if chunk.text] == list(text)
    assert [token for chunk in chunks for token in chunk.token_ids] == tokenizer.encode(text)
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].stats is not None


def test_a_character_that_max_tokens_cuts_is_not_shown_but_its_ids_are(
    new_engine: NewEngine, tokenizer: Tokenizer
) -> None:
    done = new_engine(saying(tokenizer, "p", "a😀")).generate("p", max_tokens=3)
    assert (done.text, len(done.token_ids), done.finish_reason) == ("a", 3, "length")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_ends_the_answer(new_engine: NewEngine, max_tokens: int) -> None:
    done = new_engine(fake()).generate(token_ids=[1, 2, 3], max_tokens=max_tokens)
    assert list(done.token_ids) == expected([1, 2, 3], max_tokens, {END}, rule(END))
    assert done.finish_reason == "length"


def test_an_end_token_at_once_gives_an_empty_answer(new_engine: NewEngine) -> None:
    done = new_engine(fake(lambda _: END)).generate("hello", max_tokens=5)
    assert (done.text, done.token_ids, done.finish_reason) == ("", (), "stop")
    assert done.stats.generated_tokens == 0


def test_any_of_several_end_tokens_stops_and_none_never_does(new_engine: NewEngine) -> None:
    def counting(tokens: Sequence[int]) -> int:
        return 64 + len(tokens)

    assert new_engine(fake(counting), eos=(70, 66)).generate("a", max_tokens=9).token_ids == (65,)
    assert len(new_engine(fake(lambda _: END), eos=()).generate("a", max_tokens=9).token_ids) == 9


@pytest.mark.parametrize("prompt_tokens", [1, 15, 19, 20])
def test_a_full_context_ends_the_answer(new_engine: NewEngine, prompt_tokens: int) -> None:
    session = fake()
    engine = new_engine(session, context_length=20)
    prompt = list(range(prompt_tokens))
    done = engine.generate(token_ids=prompt, max_tokens=100)
    # The last chosen token needs no position.
    assert len(done.token_ids) == 20 - prompt_tokens + 1
    assert done.finish_reason == "context_full"
    assert len(session.tokens) == 20
    exactly = engine.generate(token_ids=prompt, max_tokens=20 - prompt_tokens + 1)
    assert (exactly.token_ids, exactly.finish_reason) == (done.token_ids, "length")


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(new_engine: NewEngine) -> None:
    with pytest.raises(ContextLengthError, match=r"\b21\b.*\b20\b"):
        new_engine(fake(), context_length=20).generate(token_ids=[1] * 21)


def test_a_conversation_that_goes_on_runs_only_what_is_new(new_engine: NewEngine) -> None:
    session = fake()
    engine = new_engine(session)
    first = engine.generate(token_ids=[5, 6, 7], max_tokens=4)
    prompt = [5, 6, 7, *first.token_ids, 9, 9]
    session.steps.clear()
    second = engine.generate(token_ids=prompt, max_tokens=3)
    assert list(second.token_ids) == expected(prompt, 3, {END}, rule(END))
    assert second.stats.reused_tokens == 3 + 3
    assert session.steps[0] == [first.token_ids[-1], 9, 9]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "a", "token_ids": [1]},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"prompt": "a", "token_ids": [1], "messages": []},
        {"prompt": ""},
        {"token_ids": []},
        {"messages": []},
        {"token_ids": [0, END + 1]},
        {"token_ids": [-1]},
        {"token_ids": ["a"]},
        {"token_ids": [None]},
        {"token_ids": [1.5]},
        {"token_ids": 5},
        {"prompt": 5},
        {"prompt": b"bytes"},
        {"prompt": "half \ud83d"},
    ],
    ids=repr,
)
def test_invalid_prompts_are_refused_at_the_call(new_engine: NewEngine, arguments: dict[str, Any]) -> None:
    session = fake()
    engine = new_engine(session)
    for call in (engine.generate, engine.stream, engine.encode):
        with pytest.raises(PromptError):
            call(**arguments)
    assert session.steps == []


@pytest.mark.parametrize("max_tokens", [0, -1, True, False, 1.5, 3.0, "3", None])
def test_invalid_max_tokens_are_refused_at_the_call(new_engine: NewEngine, max_tokens: Any) -> None:
    engine = new_engine(fake())
    for call in (engine.generate, engine.stream):
        with pytest.raises(SettingsError, match="max_tokens"):
            call("a", max_tokens=max_tokens)


def test_a_numpy_array_of_ids_is_as_good_as_a_list(new_engine: NewEngine) -> None:
    engine = new_engine(fake())
    ids: Any = np.array([3, 1, 4], np.int64)
    assert engine.encode(token_ids=ids) == [3, 1, 4]
    assert (
        engine.generate(token_ids=ids, max_tokens=3).token_ids
        == engine.generate(token_ids=[3, 1, 4], max_tokens=3).token_ids
    )
    with pytest.raises(PromptError):
        engine.encode(token_ids=ids[:0])


def test_messages_need_a_template(new_engine: NewEngine) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        new_engine(fake()).generate(messages=[{"role": "user", "content": "a"}])


def test_messages_go_through_the_template_without_further_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    bundle = Bundle(tmp_path, manifest(files={"chat_template.jinja": FileEntry(len(template), "")}))
    engine = Engine(bundle, fake(), tokenizer, None)
    assert engine.encode(messages=[{"role": "user", "content": "hi"}]) == tokenizer.encode("<user>hi>>", special=False)
    for wrong in ("hello", {"role": "user", "content": "hi"}, b"a", 5, {1}, ["hello"], [["role", "user"]], [5], [None]):
        with pytest.raises(PromptError, match=r'must be .*"role": "user"'):
            engine.encode(messages=wrong)  # type: ignore[arg-type]
    for alone in ({"role": "user", "content": "hi"}, {1}, 5):
        with pytest.raises(PromptError, match="prompt 0 of the batch"):
            engine.generate_batch([alone])  # type: ignore[list-item]


# ---- cancelling, nesting, threads, closing


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_a_stream_frees_the_engine_and_keeps_the_cache(
    new_engine: NewEngine, taken: int, with_cache: bool
) -> None:
    session = fake(lambda tokens: 65 + len(tokens) % 20)
    engine = new_engine(session, ResponseCache() if with_cache else None)
    stream = engine.stream("prompt", max_tokens=20)
    for _ in range(taken):
        next(stream)
    stream.close()
    if taken:
        assert engine.generate("prompt and more", max_tokens=2).stats.reused_tokens == 6
    fresh = new_engine(fake(lambda tokens: 65 + len(tokens) % 20)).generate("prompt", max_tokens=20)
    again = engine.generate("prompt", max_tokens=20)
    assert (again.text, again.token_ids, again.finish_reason) == (fresh.text, fresh.token_ids, fresh.finish_reason)
    assert not again.stats.response_cache_hit, "a cancelled answer must not be stored"
    engine.close()
    assert session.closed


def test_leaving_the_loop_frees_the_engine(new_engine: NewEngine) -> None:
    engine = new_engine(fake(), ResponseCache())
    for _ in engine.stream("a", max_tokens=20):
        break
    assert engine.generate("b", max_tokens=2).finish_reason == "length"


def test_a_nested_request_of_the_same_thread_is_answered_and_harms_nothing(new_engine: NewEngine) -> None:
    engine = new_engine(fake(lambda tokens: 65 + len(tokens)))
    stream = engine.stream("ab", max_tokens=6)
    first = next(stream)
    assert engine.generate("other", max_tokens=1).finish_reason == "length"
    assert len(list(engine.stream("other", max_tokens=1))) == 2
    rest = list(stream)
    assert "".join(chunk.text for chunk in [first, *rest]) == engine.generate("ab", max_tokens=6).text
    assert engine.generate("other", max_tokens=1).finish_reason == "length"


def test_a_request_from_within_a_step_is_refused(new_engine: NewEngine) -> None:
    """It would wait forever for the step that it runs in."""
    refused: list[Exception] = []

    class Asking(FakeSession):
        def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
            for call in (lambda: engine.generate("b", max_tokens=1), engine.close):
                try:
                    call()
                except EngineBusyError as error:
                    refused.append(error)
            return super().step(token_ids, keep)

    engine = new_engine(Asking(END + 1, rule(END)))
    assert engine.generate(token_ids=[1, 2], max_tokens=2).finish_reason == "length"
    assert len(refused) == 4
    engine.close()


def test_a_failing_step_frees_the_engine_and_stores_nothing(new_engine: NewEngine) -> None:
    responses = ResponseCache()
    engine = new_engine(FailingSession(END + 1, rule(END), {2}), responses)
    with pytest.raises(SessionError):
        engine.generate(token_ids=[1, 2], max_tokens=5)
    assert len(responses) == 0
    done = engine.generate(token_ids=[1, 2], max_tokens=5)
    assert list(done.token_ids) == expected([1, 2], 5, {END}, rule(END))


class WatchfulSession(FakeSession):
    """Lets other threads run inside each step, and notes if another thread steps meanwhile."""

    inside = False
    overlapped = False

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        self.overlapped |= self.inside
        self.inside = True
        time.sleep(0.0005)
        try:
            return super().step(token_ids, keep)
        finally:
            self.inside = False


@pytest.mark.parametrize("with_cache", [False, True])
def test_threads_never_step_at_once_and_are_all_answered(new_engine: NewEngine, with_cache: bool) -> None:
    session = WatchfulSession(END + 1, rule(END))
    engine = new_engine(session, ResponseCache() if with_cache else None)
    start = threading.Barrier(6)
    answers: dict[tuple[int, int], list[int]] = {}

    def ask(worker: int) -> None:
        start.wait(30)
        for turn in range(5):
            prompt = [1, 2, (worker + turn) % 3, turn % 2]
            if turn == 2:
                next(engine.stream(token_ids=[9, worker], max_tokens=4))
            answers[worker, turn] = list(engine.generate(token_ids=prompt, max_tokens=5).token_ids)

    workers = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(answers) == 30
    for (index, turn), answer in answers.items():
        assert answer == expected([1, 2, (index + turn) % 3, turn % 2], 5, {END}, rule(END))
    assert not session.overlapped


def test_another_thread_waits_for_an_open_stream(new_engine: NewEngine) -> None:
    engine = new_engine(fake())
    answers: list[list[int]] = []
    other = threading.Thread(
        target=lambda: answers.append(list(engine.generate(token_ids=[8, 9], max_tokens=4).token_ids))
    )
    stream = engine.stream(token_ids=[1, 2], max_tokens=6)
    first = next(stream)
    other.start()
    mine = [first, *stream]
    other.join(30)
    assert [token for chunk in mine for token in chunk.token_ids] == expected([1, 2], 6, {END}, rule(END))
    assert answers == [expected([8, 9], 4, {END}, rule(END))]


def test_closing_waits_for_the_whole_answer_of_another_thread(new_engine: NewEngine) -> None:
    session = WatchfulSession(END + 1, rule(END))
    engine = new_engine(session)
    done: list[Completion] = []
    other = threading.Thread(target=lambda: done.append(engine.generate(token_ids=[3], max_tokens=50)))
    other.start()
    while len(session.steps) < 3:
        time.sleep(0.001)
    engine.close()
    other.join(30)
    assert session.closed
    assert [list(one.token_ids) for one in done] == [expected([3], 50, {END}, rule(END))]


def test_closing_ends_streams_and_requests_that_wait(new_engine: NewEngine) -> None:
    engine = new_engine(fake())
    streams = [engine.stream(token_ids=[1, index], max_tokens=60) for index in range(2)]
    next(streams[0])
    waiting = engine._scheduler.submit(streams[1]._request)
    assert engine._scheduler.counts() == (1, 1)
    engine.close()
    with pytest.raises(EngineClosedError, match="while this answer was computed"):
        next(streams[0])
    with pytest.raises(EngineClosedError, match="while this request waited"):
        engine._scheduler.next([waiting])


def test_a_closed_engine_refuses_requests_and_can_be_closed_again(new_engine: NewEngine) -> None:
    session = fake()
    with new_engine(session) as engine:
        waiting = engine.stream("a", max_tokens=2)
        engine.generate("b", max_tokens=1)
    assert session.closed
    engine.close()
    steps = len(session.steps)
    for call in (engine.generate, engine.stream):
        with pytest.raises(EngineClosedError):
            call("a")
    with pytest.raises(EngineClosedError):
        next(waiting)
    assert len(session.steps) == steps


# ---- the response cache behind an engine


def parts(chunks: Sequence[Chunk]) -> list[tuple[str, tuple[int, ...], str | None]]:
    return [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in chunks]


def test_the_same_request_is_computed_once_and_streams_the_same_chunks(
    new_engine: NewEngine, tokenizer: Tokenizer
) -> None:
    session = saying(tokenizer, "ask", "a😀 b")
    engine = new_engine(session, ResponseCache())
    first = list(engine.stream("ask", max_tokens=20))
    steps = len(session.steps)
    second = list(engine.stream("ask", max_tokens=20))
    assert parts(second) == parts(first)
    assert len(session.steps) == steps
    assert first[-1].stats is not None and second[-1].stats is not None
    assert not first[-1].stats.response_cache_hit
    assert second[-1].stats.response_cache_hit
    assert second[-1].stats.generated_tokens == first[-1].stats.generated_tokens
    assert second[-1].stats.prompt_tokens == 3
    done = engine.generate(token_ids=tokenizer.encode("ask"), max_tokens=20)
    assert done.stats.response_cache_hit, "only the ids count, not how they were given"
    assert done.text == "a😀 b"


def test_a_hit_is_served_while_the_engine_is_held(new_engine: NewEngine) -> None:
    engine = new_engine(fake(), ResponseCache())
    known = engine.generate(token_ids=[1], max_tokens=3)
    stream = engine.stream(token_ids=[2], max_tokens=9)
    next(stream)
    again = engine.generate(token_ids=[1], max_tokens=3)
    assert (again.text, again.token_ids) == (known.text, known.token_ids)


@pytest.mark.parametrize("other", [{"max_tokens": 4}, {"token_ids": [1, 3]}, {"token_ids": [12]}])
def test_another_request_is_not_a_hit(new_engine: NewEngine, other: dict[str, Any]) -> None:
    engine = new_engine(fake(), ResponseCache())
    engine.generate(token_ids=[1, 2], max_tokens=3)
    request = {"token_ids": [1, 2], "max_tokens": 3, **other}
    done = engine.generate(**request)
    assert not done.stats.response_cache_hit
    assert list(done.token_ids) == expected(request["token_ids"], request["max_tokens"], {END}, rule(END))


@pytest.mark.parametrize(
    "settings",
    [{"files": {"model.onnx": FileEntry(1, "sha256:0")}}, {"eos": (END, 5)}],
    ids=["other digest", "other stop ids"],
)
def test_another_bundle_on_the_same_cache_is_not_a_hit(new_engine: NewEngine, settings: dict[str, Any]) -> None:
    responses = ResponseCache()
    new_engine(fake(), responses).generate(token_ids=[1, 2], max_tokens=3)
    assert new_engine(fake(), responses).generate(token_ids=[1, 2], max_tokens=3).stats.response_cache_hit
    assert (
        not new_engine(fake(), responses, **settings).generate(token_ids=[1, 2], max_tokens=3).stats.response_cache_hit
    )


def test_without_a_response_cache_nothing_is_a_hit(new_engine: NewEngine) -> None:
    engine = new_engine(fake(), None)
    first = engine.generate(token_ids=[1, 2], max_tokens=3)
    second = engine.generate(token_ids=[1, 2], max_tokens=3)
    assert not second.stats.response_cache_hit
    assert second.token_ids == first.token_ids
    assert second.stats.reused_tokens == 1


def test_stats_and_chunks_cannot_be_changed(new_engine: NewEngine) -> None:
    done = new_engine(fake()).generate("a", max_tokens=1)
    for item in (done, done.stats):
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.text = ""  # type: ignore[misc,union-attr]


# ---- the fake follows the protocol


def test_the_fake_gives_the_logits_of_the_last_rows_and_refuses_impossible_requests() -> None:
    session = fake(lambda tokens: tokens[-1] + 1)
    assert session.step([4, 5, 6], 2).argmax(axis=1).tolist() == [6, 7]
    assert session.length == 3
    session.rewind(1)
    assert session.tokens == [4]
    for length in (-1, 2):
        with pytest.raises(ValueError):
            session.rewind(length)
    for keep in (-1, 3):
        with pytest.raises(ValueError):
            session.step([1, 2], keep)
    assert session.step([5, 6], 0).shape == (0, session.vocab_size)
    assert session.tokens == [4, 5, 6]
