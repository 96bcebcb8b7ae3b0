"""Row-wise INT8 gives the same bits however a text is cut, rewound or reused, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Engine, load
from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.bundle.manifest import EXACT_SCHEMES
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import TEXT

TOKENS = 320  # more than the 256 positions that the cache starts with
BUNDLES = ["int8 cache", "float32 cache", "stories260k", "4 bits"]


class Exact:
    """A bundle, a text for it, sessions with one and two threads, and the logits of the text fed whole."""

    def __init__(self, folder: Path) -> None:
        self.bundle = Bundle.open(folder)
        assert self.bundle.manifest.quantization.scheme in EXACT_SCHEMES
        self.ids = Tokenizer(folder / "tokenizer.json").encode(TEXT)[:TOKENS]
        assert len(self.ids) == TOKENS
        self.session = self.fresh(1)
        self.two_threads = self.fresh(2)
        self.whole = self.fresh(1).step(self.ids, TOKENS).copy()
        self.engine = load(folder, threads=1, response_cache=False)

    def fresh(self, threads: int) -> OrtSession:
        """A session that has not run yet, so its cache has no buffers."""
        return OrtSession(self.bundle.path / GRAPH_NAME, self.bundle.manifest.model, threads)

    @property
    def vocab_size(self) -> int:
        return self.bundle.manifest.model.vocab_size


@pytest.fixture(scope="module")
def exact_of(
    export_tiny: Callable[..., Path], stories_bundle: Callable[[str], Path]
) -> Iterator[Callable[[str], Exact]]:
    """Bundles by name, opened once for all tests of this file."""
    opened: dict[str, Exact] = {}

    def get(name: str) -> Exact:
        if name not in opened:
            folders = {
                "int8 cache": export_tiny,
                "float32 cache": lambda: export_tiny(kv="float32"),
                "stories260k": lambda: stories_bundle("int8-rowwise"),
                "4 bits": lambda: export_tiny(scheme="int4-rowwise", max_kl=5.0),
            }
            opened[name] = Exact(folders[name]())
        return opened[name]

    yield get
    for exact in opened.values():
        exact.engine.close()


@pytest.fixture(params=BUNDLES)
def exact(request: pytest.FixtureRequest, exact_of: Callable[[str], Exact]) -> Exact:
    return exact_of(request.param)


def feed(session: OrtSession, ids: Sequence[int], cuts: Sequence[int]) -> NDArray[np.float32]:
    """Logits of the text from the session's position on, fed in pieces of these sizes, repeated in turn."""
    rows, turn = [], 0
    while session.length < len(ids):
        piece = ids[session.length : session.length + cuts[turn % len(cuts)]]
        rows.append(session.step(piece, len(piece)).copy())
        turn += 1
    return np.concatenate(rows)


def assert_same_bits(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    differs = np.flatnonzero((got.view(np.int32) != expected.view(np.int32)).any(axis=1))
    assert not differs.size, (
        f"{differs.size} rows differ, the first is {differs[0]}, by up to {np.abs(got - expected).max():.3g}"
    )


def test_the_caches_are_of_the_types_they_are_named_for(exact_of: Callable[[str], Exact]) -> None:
    types = {name: exact_of(name).bundle.manifest.model.kv.type for name in ("int8 cache", "float32 cache")}
    assert types == {"int8 cache": "int8", "float32 cache": "float32"}


def test_the_text_is_not_trivial(exact: Exact) -> None:
    """Otherwise the comparisons below would prove nothing: logits must be finite and differ between rows."""
    assert np.isfinite(exact.whole).all()
    assert len(np.unique(exact.whole.argmax(axis=1))) > 10
    assert len(np.unique(exact.whole, axis=0)) > TOKENS // 2


def test_token_by_token(exact: Exact) -> None:
    exact.session.rewind(0)
    assert_same_bits(feed(exact.session, exact.ids, [1]), exact.whole)


def test_steps_without_logits(exact: Exact) -> None:
    session = exact.session
    session.rewind(0)
    assert session.step(exact.ids[:1], 0).shape == (0, exact.whole.shape[1])
    assert session.step(exact.ids[1:40], 0).shape == (0, exact.whole.shape[1])
    assert_same_bits(feed(session, exact.ids, [50]), exact.whole[40:])


@pytest.mark.parametrize("cuts", [(2,), (257,), (256, 1), (64, 1, 31), (TOKENS - 1, 1)])
def test_fixed_cuts_with_one_and_two_threads(exact: Exact, cuts: tuple[int, ...]) -> None:
    for session in (exact.session, exact.two_threads):
        session.rewind(0)
        assert_same_bits(feed(session, exact.ids, cuts), exact.whole)


@pytest.mark.parametrize("name", BUNDLES)
@given(cuts=st.lists(st.integers(1, 90), min_size=1, max_size=12), threads=st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_cuts(exact_of: Callable[[str], Exact], name: str, cuts: list[int], threads: int) -> None:
    exact = exact_of(name)
    session = exact.session if threads == 1 else exact.two_threads
    session.rewind(0)
    assert_same_bits(feed(session, exact.ids, cuts), exact.whole)


@pytest.mark.parametrize("name", BUNDLES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rewinds_leave_no_trace(exact_of: Callable[[str], Exact], name: str, data: st.DataObject) -> None:
    """Feed, rewind, feed something else over it, rewind again: the text's logits never change."""
    exact = exact_of(name)
    session = exact.session
    session.rewind(0)
    held = 0  # positions that hold the text
    for _ in range(data.draw(st.integers(1, 4), label="rounds")):
        end = data.draw(st.integers(held + 1, TOKENS), label="feed to")
        assert_same_bits(feed(session, exact.ids[:end], [50]), exact.whole[held:end])
        held = data.draw(st.integers(0, end - 1), label="rewind to")
        session.rewind(held)
        others = data.draw(st.lists(st.integers(0, exact.vocab_size - 1), max_size=40), label="other tokens")
        others = others[: TOKENS - held]
        if others:
            session.step(others)
        session.rewind(held)
    assert_same_bits(feed(session, exact.ids, [TOKENS]), exact.whole[held:])


def test_growth_of_the_cache_changes_nothing(exact: Exact) -> None:
    """A fresh session grows its buffers while it is fed; a used one has full-sized buffers from the start."""
    growing = exact.fresh(1)
    capacities = []
    rows = []
    while growing.length < TOKENS:
        rows.append(growing.step(exact.ids[growing.length : growing.length + 40], 40).copy())
        capacities.append(growing.cache.capacity)
        growing.cache.check()
    assert capacities[0] < TOKENS < capacities[-1], "the buffers did not grow on the way"
    assert_same_bits(np.concatenate(rows), exact.whole)
    growing.rewind(0)
    assert_same_bits(feed(growing, exact.ids, [40]), exact.whole)
    assert growing.cache.capacity == capacities[-1]


@pytest.mark.parametrize("before", [254, 255, 256, 257])
def test_growth_by_a_single_token(exact: Exact, before: int) -> None:
    growing = exact.fresh(1)
    growing.step(exact.ids[:before])
    assert_same_bits(feed(growing, exact.ids[:260], [1]), exact.whole[before:260])


@contextmanager
def recorded(session: OrtSession) -> Iterator[list[NDArray[np.float32]]]:
    """The logits of the last token of each step inside the block."""
    rows: list[NDArray[np.float32]] = []
    step = session.step

    def recording(token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        logits = step(token_ids, keep)
        rows.extend(logits[-1:].copy())
        return logits

    session.step = recording  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        del session.step  # type: ignore[method-assign]


@pytest.mark.parametrize("prompt", [1, 2, 60, 250])
def test_decoding_gives_the_logits_of_the_whole_text(exact: Exact, prompt: int) -> None:
    """Each choice and its logits are those of the finished text fed at once."""
    session = exact.fresh(2)
    with recorded(session) as rows:
        tokens = list(Sequencer(session, piece_tokens=100).greedy(exact.ids[:prompt], 30, ()))
    text = [*exact.ids[:prompt], *tokens]
    whole = exact.fresh(1).step(text, len(text)).copy()
    assert_same_bits(np.array(rows[-len(tokens) :]), whole[prompt - 1 : -1])
    assert tokens == whole[prompt - 1 : -1].argmax(axis=1).tolist()


def engine_ids(engine: Engine, ids: Sequence[int], count: int) -> tuple[list[int], int]:
    """The engine's answer and the number of prompt tokens that it reused."""
    done = engine.generate(token_ids=ids, max_tokens=count)
    return list(done.token_ids), done.stats.reused_tokens


@pytest.mark.parametrize("prompt", [30, 240])
def test_the_engine_answers_as_the_text_fed_whole(exact: Exact, prompt: int) -> None:
    tokens, _ = engine_ids(exact.engine, exact.ids[:prompt], 24)
    text = [*exact.ids[:prompt], *tokens]
    whole = exact.fresh(1).step(text, len(text)).copy()
    chosen = whole[prompt - 1 :].argmax(axis=1).tolist()
    assert tokens == chosen[:-1]
    if len(tokens) < 24:
        assert chosen[-1] in exact.bundle.manifest.tokens.eos


def test_a_reused_prefix_changes_no_answer(exact: Exact) -> None:
    """The prompts share prefixes of different lengths, so most of them reuse part of the cache."""
    prompts = [exact.ids[:200], exact.ids[:90] + exact.ids[150:180], exact.ids[:130], exact.ids[:280], exact.ids[:31]]
    reused_in_all = 0
    for prompt in prompts:
        tokens, reused = engine_ids(exact.engine, prompt, 16)
        reused_in_all += reused
        alone = exact.fresh(2)
        expected = list(Sequencer(alone).greedy(prompt, 16, exact.bundle.manifest.tokens.eos))
        if expected[-1] in exact.bundle.manifest.tokens.eos:
            expected.pop()
        assert tokens == expected
    assert reused_in_all > 300, "too few tokens were reused to test anything"


@pytest.mark.parametrize(("prompt", "capacity"), [(200, 400), (280, 513), (31, 256)])
def test_buffers_for_prompt_and_answer_are_allocated_once(exact: Exact, prompt: int, capacity: int) -> None:
    session = exact.fresh(1)
    for _ in Sequencer(session, piece_tokens=100).greedy(exact.ids[:prompt], 60, ()):
        assert session.cache.capacity == capacity


def test_logits_after_a_reused_prefix(exact: Exact) -> None:
    session = exact.fresh(1)
    sequencer = Sequencer(session, piece_tokens=37)
    list(sequencer.greedy(exact.ids[:150] + exact.ids[:60], 1, ()))
    assert sequencer.reusable(exact.ids) == 150
    with recorded(session) as rows:
        list(sequencer.greedy(exact.ids, 1, ()))
    assert_same_bits(np.array(rows[-1:]), exact.whole[-1:])
    assert session.length == TOKENS
