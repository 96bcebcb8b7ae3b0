"""Concurrent requests: they share steps, do not wait for slow readers, and can be closed at any point."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.runtime import Completion, Engine, load
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.errors import EngineClosedError, EngineError, SessionError, SettingsError
from edgelm.runtime.fake import FakeSession

from .test_decode import (
    END,
    NewEngine,
    WatchfulSession,
    expected,
    fake,
    new_engine,
    rule,
    tokenizer,
    tokenizer_folder,
)

__all__ = ["new_engine", "tokenizer", "tokenizer_folder"]


class SlowSession(FakeSession):
    """Takes time for each step and for each token in it."""

    step_s = 0.002
    token_s = 0.0

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        time.sleep(self.step_s + self.token_s * len(token_ids))
        return super().step(token_ids, keep)


def slow() -> SlowSession:
    return SlowSession(END + 1, rule(END))


@pytest.fixture
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with load(tiny_bundle, threads=1, response_cache=False, prefix_cache=False) as engine:
        yield engine


def facts(done: Completion) -> tuple[Any, ...]:
    return done.text, done.token_ids, done.finish_reason


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(7)  # noqa: S311, not for cryptography
    return [[numbers.randrange(3, 250) for _ in range(numbers.choice([1, 5, 40, 300]))] for _ in range(count)]


def is_soon(engine: Engine, counts: tuple[int, int]) -> bool:
    """Return whether so many requests run and wait soon; waits for the current step."""
    until = time.monotonic() + 5
    while engine.requests != counts and time.monotonic() < until:
        time.sleep(0.001)
    return engine.requests == counts


# ---- rows of one batch


def test_threads_share_steps_and_get_the_answers_of_each_alone(engine: Engine) -> None:
    asked = prompts(30)
    alone = [facts(engine.generate(token_ids=ids, max_tokens=20)) for ids in asked]
    with ThreadPoolExecutor(15) as pool:
        together = list(pool.map(lambda ids: facts(engine.generate(token_ids=ids, max_tokens=20)), asked))
    assert together == alone
    assert engine.requests == (0, 0)


def test_tasks_share_steps_and_get_the_answers_of_each_alone(engine: Engine) -> None:
    asked = prompts(30)
    alone = [facts(engine.generate(token_ids=ids, max_tokens=20)) for ids in asked]

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(engine.agenerate(token_ids=ids, max_tokens=20) for ids in asked))

    assert [facts(done) for done in asyncio.run(ask())] == alone


def test_requests_closed_at_any_point_harm_no_other(engine: Engine) -> None:
    """200 requests are closed in the queue, in the prompt or in the answer. The other answers are right, and all rows
    become free."""
    numbers = random.Random(3)  # noqa: S311
    asked = prompts(20)
    alone = [facts(engine.generate(token_ids=ids, max_tokens=12)) for ids in asked]
    wrong: list[int] = []
    threads = threading.active_count()

    async def leaving(ids: list[int]) -> None:
        task = asyncio.create_task(
            engine.agenerate(token_ids=ids, max_tokens=9000, min_tokens=9000, context_full="slide")
        )
        await asyncio.sleep(numbers.random() * 0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def staying(index: int) -> None:
        if facts(await engine.agenerate(token_ids=asked[index], max_tokens=12)) != alone[index]:
            wrong.append(index)

    async def ask() -> None:
        for _ in range(10):
            await asyncio.gather(
                *(leaving(numbers.choice(asked)) for _ in range(20)), *(staying(index) for index in range(0, 20, 3))
            )

    asyncio.run(ask())
    assert wrong == []
    assert is_soon(engine, (0, 0))
    assert threading.active_count() <= threads + 1, "at most the worker is left, which ends when idle"


def test_equal_requests_at_once_are_computed_once(new_engine: NewEngine) -> None:
    session = slow()
    engine = new_engine(session, ResponseCache())

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(engine.agenerate(token_ids=[1, 2], max_tokens=9) for _ in range(20)))

    done = asyncio.run(ask())
    assert {one.token_ids for one in done} == {tuple(expected([1, 2], 9, {END}, rule(END)))}
    assert len(session.steps) == 9
    assert [one.stats.response_cache_hit for one in done].count(False) == 1


def test_first_tokens_come_in_the_order_of_the_requests(new_engine: NewEngine) -> None:
    engine = new_engine(slow())
    order: list[int] = []

    async def one(index: int) -> None:
        await asyncio.sleep(0.01 * index)
        async for _ in engine.astream(token_ids=[index], max_tokens=30):
            if index not in order:
                order.append(index)

    async def ask() -> None:
        await asyncio.gather(*(one(index) for index in range(8)))

    asyncio.run(ask())
    assert order == list(range(8))


# ---- leaving


def test_closing_a_stream_while_another_thread_iterates_ends_it(new_engine: NewEngine) -> None:
    session = slow()
    engine = new_engine(session)
    stream = engine.stream(token_ids=[1, 2], max_tokens=60)
    got = [next(stream)]
    reader = threading.Thread(target=lambda: got.extend(stream))
    reader.start()
    while len(got) < 4:
        time.sleep(0.001)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    steps = len(session.steps)
    assert steps < 50
    assert engine.generate(token_ids=[5], max_tokens=1).finish_reason == "length"
    assert len(session.steps) == steps + 1


def test_a_closed_stream_has_its_stats(new_engine: NewEngine) -> None:
    with new_engine(fake()).stream(token_ids=[1, 2, 3], max_tokens=20) as stream:
        assert stream.stats is None and stream.progress == (0, 3)
        for _ in range(4):
            next(stream)
    assert stream.stats is not None
    assert (stream.stats.prompt_tokens, stream.progress) == (3, (3, 3))
    assert stream.stats.generated_tokens >= 4
    assert stream.stats.decode_tokens_per_s > 0
    assert list(stream) == []


def test_cancelled_tasks_leave_no_threads(new_engine: NewEngine) -> None:
    """Forty tasks, behind a client that stopped reading."""
    engine = new_engine(slow())
    before = threading.active_count()

    async def ask() -> None:
        stream = engine.astream(token_ids=[1], max_tokens=60)
        await anext(stream)
        tasks = [asyncio.create_task(engine.agenerate(token_ids=[2, index], max_tokens=60)) for index in range(40)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done)
        assert is_soon(engine, (1, 0))
        await stream.aclose()

    asyncio.run(ask())
    assert threading.active_count() <= before + 1
    assert is_soon(engine, (0, 0))


def test_a_process_ends_despite_an_open_stream(tiny_bundle: Path) -> None:
    program = f"""
import asyncio
from edgelm.runtime import load
engine = load({str(tiny_bundle)!r}, threads=1, response_cache=False, prefix_cache=False)
async def ask():
    global stream
    stream = engine.astream("a", max_tokens=400)
    await anext(stream)
    task = asyncio.create_task(engine.agenerate("b", max_tokens=400))
    await asyncio.sleep(0.01)
    task.cancel()
asyncio.run(ask())
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_the_worker_pauses_while_a_reader_does_not_read(new_engine: NewEngine) -> None:
    session = slow()
    engine = new_engine(session, context_length=2_000)

    async def ask() -> None:
        stream = engine.astream(token_ids=[1], max_tokens=1_900)
        await anext(stream)
        await asyncio.sleep(0.3)
        steps = len(session.steps)
        assert steps < 100
        await asyncio.sleep(0.1)
        assert len(session.steps) == steps
        rest = [chunk async for chunk in stream]
        assert rest[-1].finish_reason == "length"

    asyncio.run(ask())


@pytest.mark.parametrize("ended", ["close", "del"])
def test_a_stream_dropped_before_it_begins_computes_nothing(new_engine: NewEngine, ended: str) -> None:
    session = fake()
    engine = new_engine(session)
    stream: Any = engine.stream(token_ids=[1], max_tokens=5)
    if ended == "close":
        stream.close()
    del stream
    gc.collect()
    assert session.steps == []
    assert engine.requests == (0, 0)


# ---- deadlines


def test_a_deadline_comes_in_time_in_a_long_prompt(new_engine: NewEngine) -> None:
    """Pieces get shorter when little time is left; a full piece would take half a second."""
    session = slow()
    session.token_s = 0.002
    engine = new_engine(session, context_length=4_000)
    started = time.perf_counter()
    done = engine.generate(token_ids=[1] * 3_000, max_tokens=5, timeout=0.5)
    assert done.finish_reason == "deadline"
    assert time.perf_counter() - started < 0.8
    assert sum(map(len, session.steps)) > 100


def test_deadlines_are_each_callers_own_in_a_shared_answer(new_engine: NewEngine) -> None:
    engine = new_engine(slow(), ResponseCache(), context_length=2_000)

    async def ask() -> list[Completion]:
        return await asyncio.gather(
            *(engine.agenerate(token_ids=[1], max_tokens=60, timeout=timeout) for timeout in (None, 0.05, 30))
        )

    whole, late, other = asyncio.run(ask())
    assert late.finish_reason == "deadline"
    assert whole.finish_reason == other.finish_reason == "length"
    assert whole.token_ids == other.token_ids
    assert late.token_ids == whole.token_ids[: len(late.token_ids)]


# ---- the event loop


def test_the_event_loop_stays_free_while_a_prompt_is_encoded(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(fake())
    encode = engine._requests.prompts.encode

    def slowly(*arguments: Any, **options: Any) -> list[int]:
        time.sleep(0.3)
        return encode(*arguments, **options)

    monkeypatch.setattr(engine._requests.prompts, "encode", slowly)

    async def ask() -> int:
        task = asyncio.create_task(engine.agenerate("abc", max_tokens=2))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.005)
            turns += 1
        return turns

    assert asyncio.run(ask()) > 20


# ---- closing, faults, forks


def test_a_closed_engine_answers_nothing_from_its_cache(new_engine: NewEngine) -> None:
    engine = new_engine(fake(), ResponseCache())
    engine.generate(token_ids=[1], max_tokens=3)
    known = engine.stream(token_ids=[1], max_tokens=3)
    engine.close()
    with pytest.raises(EngineClosedError):
        next(known)


def test_a_failing_request_harms_no_other(engine: Engine) -> None:
    asked = prompts(6)
    alone = [facts(engine.generate(token_ids=ids, max_tokens=20)) for ids in asked]
    bias = dict.fromkeys(range(engine.bundle.manifest.model.vocab_size), -float("inf"))

    async def ask() -> list[Any]:
        requests = [engine.agenerate(token_ids=ids, max_tokens=20) for ids in asked]
        refused = engine.agenerate("a", logit_bias=bias)
        return await asyncio.gather(*requests, refused, return_exceptions=True)

    *done, error = asyncio.run(ask())
    assert isinstance(error, SettingsError)
    assert [facts(one) for one in done] == alone


@pytest.mark.parametrize("error", [SessionError("the step failed"), RuntimeError("a fault"), KeyboardInterrupt()])
def test_a_failing_step_is_raised_and_the_engine_goes_on(new_engine: NewEngine, error: BaseException) -> None:
    class Failing(WatchfulSession):
        fails = False

        def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
            if self.fails:
                self.fails = False
                raise error
            return super().step(token_ids, keep)

    session = Failing(END + 1, rule(END))
    engine = new_engine(session)
    stream = engine.stream(token_ids=[1, 2], max_tokens=50)
    waiting = engine.stream(token_ids=[3], max_tokens=4)
    next(stream)
    session.fails = True
    with pytest.raises(type(error)):
        next(stream)
    assert [token for chunk in waiting for token in chunk.token_ids] == expected([3], 4, {END}, rule(END))
    done = engine.generate(token_ids=[1, 2], max_tokens=5)
    assert list(done.token_ids) == expected([1, 2], 5, {END}, rule(END))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_an_answer_gets_an_error_and_can_ask_again(new_engine: NewEngine) -> None:
    engine = new_engine(slow())
    stream = engine.stream(token_ids=[1, 2], max_tokens=50)
    next(stream)
    with engine._scheduler._changed:  # as if another thread held it
        child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                list(stream)
            except EngineError:
                done = engine.generate(token_ids=[3], max_tokens=4)
                status = 0 if list(done.token_ids) == expected([3], 4, {END}, rule(END)) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [token for chunk in stream for token in chunk.token_ids]
