"""From an engine's chunks to the contents of a choice: parts of text, calls, the finish reason, usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from ...results import Chunk, FinishReason, Stats

if TYPE_CHECKING:
    from ...serving.asynchronous import ChunkStream

# Only OpenAI's finish reasons are sent.
_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "context_full": "length",
    "deadline": "length",
}


def wire_reason(reason: FinishReason, called: bool = False) -> str:
    """A choice's finish reason, by OpenAI's names. called: whether it holds calls."""
    return "tool_calls" if called and reason == "stop" else _REASONS[reason]


async def merged(streams: Sequence[ChunkStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several answers as they come, each with the index of its stream. Closing this closes all."""
    if len(streams) == 1:
        try:
            async for chunk in streams[0]:
                yield 0, chunk
        finally:
            await streams[0].aclose()
        return
    queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for chunk in streams[index]:
                queue.put_nowait((index, chunk))
        finally:
            await streams[index].aclose()
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is not None:
                yield item
                continue
            left -= 1
            for task in tasks:
                if task.done():
                    task.result()  # raises the error that ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(stats: Sequence[Stats], choices: int) -> dict[str, Any]:
    """OpenAI's `usage`. stats: of all answers; choices: answers for each prompt; each prompt is counted once."""
    prompts = stats[::choices]
    prompt, generated = sum(item.prompt_tokens for item in prompts), sum(item.generated_tokens for item in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(item.reused_tokens for item in prompts)},
    }


def timings_of(stats: Stats) -> dict[str, Any]:
    """An answer's figures under llama.cpp's names, in a field besides OpenAI's, which other clients ignore."""
    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": stats.prompt_tokens - stats.reused_tokens,
        "prompt_ms": round(stats.time_to_first_token_s * 1000, 3),
        "predicted_n": stats.generated_tokens,
        "predicted_per_second": round(stats.decode_tokens_per_s, 3),
        "answer_cached": stats.response_cache_hit,
    }
