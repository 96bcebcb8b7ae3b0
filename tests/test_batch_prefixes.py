"""Batches and the prefix cache: a batch reads and fills it, and no answer changes by a bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Engine, PrefixCacheSettings, load

from .conftest import require_kernels

PREAMBLE = list(range(60, 131))
PROMPTS = [[*PREAMBLE, 7, 8], [*PREAMBLE[:40], 1, 2, 3], [5, 6, 7], PREAMBLE, [*PREAMBLE, *range(30, 70)]]


@pytest.fixture(scope="module", params=[{}, {"kv": "float32"}], ids=["int8", "float32"])
def bundle(request: pytest.FixtureRequest, export_tiny: Callable[..., Path]) -> Iterator[Path]:
    """Batches on a float32 cache take the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            require_kernels(patch)
        yield export_tiny(**request.param)


@pytest.fixture(scope="module")
def cold(bundle: Path) -> Iterator[Engine]:
    with load(bundle, threads=1, response_cache=False, prefix_cache=False) as engine:
        yield engine


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    settings = PrefixCacheSettings(disk=False)
    with load(bundle, threads=1, response_cache=False, prefix_cache=settings) as engine:
        yield engine


def answers(engine: Engine, prompts: list[list[int]] = PROMPTS, **settings: Any) -> tuple[list[Any], list[int]]:
    """The answers without costs, and the reused tokens of each prompt."""
    done = engine.generate_batch(prompts, max_tokens=12, logprobs=2, **settings)
    facts = [(one.text, one.token_ids, one.finish_reason, one.logprobs) for one in done]
    return facts, [one.stats.reused_tokens for one in done]


@pytest.mark.parametrize("max_rows", [2, 5])
def test_a_batch_reuses_prefixes_of_an_earlier_batch(cold: Engine, engine: Engine, max_rows: int) -> None:
    expected, _ = answers(cold, max_rows=max_rows)
    first, _ = answers(engine, max_rows=max_rows)
    again, reused = answers(engine, max_rows=max_rows)
    assert first == again == expected
    # At least the whole blocks of 16 before the last token; more if copied from another row.
    assert [count >= (len(prompt) - 1) // 16 * 16 for count, prompt in zip(reused, PROMPTS, strict=True)] == [True] * 5
    assert min(reused[0], reused[1]) >= 32


def test_batches_and_single_requests_reuse_each_others_prefixes(cold: Engine, engine: Engine) -> None:
    expected, _ = answers(cold)
    engine.generate(token_ids=PREAMBLE, max_tokens=1)
    found, reused = answers(engine)
    assert found == expected
    assert reused[0] >= 64
    assert reused[2] == 0
    engine.generate(token_ids=[1, 2, 3], max_tokens=1)
    done = engine.generate(token_ids=PROMPTS[4], max_tokens=12, logprobs=2)
    assert done.stats.reused_tokens == 96, "whole blocks of the 110 tokens before the last one"
    assert (done.text, done.token_ids, done.finish_reason, done.logprobs) == expected[4]


def test_prefixes_are_reused_from_files_after_a_restart(bundle: Path, cold: Engine) -> None:
    expected, _ = answers(cold)
    for kept in (False, True):
        with load(bundle, threads=1, response_cache=False, prefix_cache=True) as engine:
            found, reused = answers(engine)
            assert found == expected
            assert (reused[1] > 0) == kept, "it is fed first among the prompts with this beginning"


def test_a_cancelled_batch_keeps_what_it_computed(cold: Engine, engine: Engine) -> None:
    chunks = engine.stream_batch([PROMPTS[4], PROMPTS[2]], max_tokens=12)
    next(chunks)
    chunks.close()
    done = engine.generate_batch([PROMPTS[4]], max_tokens=1)
    assert done[0].stats.reused_tokens == 110, "the row is still in the session"
    assert done[0].token_ids == cold.generate(token_ids=PROMPTS[4], max_tokens=1).token_ids


def test_a_context_that_slides_is_kept_and_stays_exact(cold: Engine, engine: Engine) -> None:
    prompts = [[*range(250), *range(250)], [*range(250), *range(240)]]
    settings = {"context_full": "slide", "keep": 20, "max_tokens": 40}
    expected = [one.token_ids for one in cold.generate_batch(prompts, **settings)]  # type: ignore[arg-type]
    for _ in range(2):
        assert [one.token_ids for one in engine.generate_batch(prompts, **settings)] == expected  # type: ignore[arg-type]
    assert engine.generate_batch(prompts, max_tokens=1)[0].stats.reused_tokens >= 480


def test_batches_for_asyncio_are_the_same(cold: Engine, engine: Engine) -> None:
    expected, _ = answers(cold)

    async def ask() -> Any:
        return await engine.agenerate_batch(PROMPTS, max_tokens=12, logprobs=2)

    done = asyncio.run(ask())
    assert [(one.text, one.token_ids, one.finish_reason, one.logprobs) for one in done] == expected


def test_a_cancelled_task_frees_the_engine(engine: Engine) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(engine.agenerate_batch(PROMPTS, max_tokens=400))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert engine.generate(token_ids=[1, 2, 3], max_tokens=2).stats.generated_tokens == 2
