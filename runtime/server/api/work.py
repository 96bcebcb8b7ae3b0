"""The running answers of one request, and how they are sent.

All prompts are checked, rendered and compared with the context before a stream's status is sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ...errors import EdgelmError
from ...results import Chunk, Stats
from ...settings import GenerationSettings
from ..context import ServerContext
from ..http.errors import JsonResponse, api_error, too_long
from ..http.streams import EventStream, event, until_disconnect
from ..models import Lease
from .answers import merged, usage_of

if TYPE_CHECKING:
    from ...serving.asynchronous import ChunkStream

_SEEDS = 2**64


class Work:
    """The answers to one request. Make it in a thread, use it on the event loop, once.

    `stats` has an entry for each answer that has ended.
    """

    def __init__(
        self,
        lease: Lease,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        choices: int,
        context: ServerContext,
    ) -> None:
        """prompts: token ids; choices: answers for each. Raises: ApiError and what `Engine.astream` raises."""
        self.lease = lease
        self.model = lease.name
        self.created = int(time.time())
        self.fingerprint = lease.engine.bundle.manifest.digest
        self.tokenizer = lease.engine.tokenizer
        self.stats: dict[int, Stats] = {}
        self._choices = choices
        self._count = len(prompts) * choices
        self._metrics = context.metrics
        self._streams: list[ChunkStream] = [
            lease.engine.astream(token_ids=ids, settings=_seeded(settings, index))
            for ids in prompts
            for index in range(choices)
        ]

    async def close(self) -> None:
        """Cancel the running answers. Calling it again does nothing."""
        for stream in self._streams:
            await stream.aclose()

    async def start(self) -> None:
        """Start computing the answers. Raises: EdgelmError for errors that only the engine can find."""
        for stream in self._streams:
            await stream.start()

    @property
    def count(self) -> int:
        """How many answers there are; answer `i` belongs to prompt `i // choices`."""
        return self._count

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks with the index of their answer. Closing this ends all answers."""
        async with aclosing(merged(self._streams)) as items:
            async for index, chunk in items:
                if chunk.stats is not None:
                    self.stats[index] = chunk.stats
                    self._metrics.answered(self.model, chunk.stats)
                yield index, chunk

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, once all answers have ended."""
        return usage_of([self.stats[index] for index in range(self.count)], self._choices)

    @property
    def cached(self) -> bool:
        """Whether all answers came from the response cache."""
        return all(item.response_cache_hit for item in self.stats.values())

    def progress(self) -> str:
        """The comment of a silent stream: how many of the prompts' tokens were read."""
        read, total = (sum(counts) for counts in zip(*(stream.progress for stream in self._streams), strict=True))
        return f"{read}/{total}"


class Answer(Protocol):
    """The form in which an endpoint sends its answers."""

    work: Work

    async def whole(self) -> dict[str, Any]:
        """The body of an answer in one piece."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error in the middle of the events."""


async def respond(
    request: Request, context: ServerContext, lease: Lease, make: Callable[[], Answer], *, stream: bool, prompt: str
) -> Response | EventStream:
    """Answer a request, and release its model in any case. make: checks the request and starts its answers, in a
    thread; prompt: the field that the prompt came in. Raises: ApiError, ClientGoneError."""
    async with AsyncExitStack() as held:
        held.callback(lease.release)
        try:
            answer = await asyncio.to_thread(make)
            held.push_async_callback(answer.work.close)
            await answer.work.start()
            if stream:
                return EventStream(
                    answer.events(),
                    held.pop_all().aclose,
                    context.settings,
                    comment=answer.work.progress,
                    failure=answer.failure,
                )
            body = await until_disconnect(request.receive, answer.whole())
            return JsonResponse(body, headers={"x-edgelm-cache": "hit"} if answer.work.cached else None)
        except EdgelmError as error:
            raise api_error(error, prompt) from error


def with_room(lease: Lease, ids: Sequence[int], asked: int | None, default: int | None) -> int:
    """The token limit of an answer: the request's, the server's default, or the rest of the context.

    Raises: ApiError, where prompt and answer do not fit.
    """
    context = lease.engine.bundle.manifest.model.context_length
    room = context - len(ids) + 1  # the last token is never fed, so it needs no position
    if len(ids) > context or (asked is not None and asked > room):
        raise too_long(len(ids), asked, context)
    return asked if asked is not None else min(default or room, room)


def new_id(kind: str) -> str:
    """An id that nothing else has."""
    return f"{kind}{secrets.token_hex(12)}"


def error_event(body: dict[str, Any]) -> bytes:
    """An error in the middle of a stream of chat or completions."""
    return event(body)


def _seeded(settings: GenerationSettings, index: int) -> GenerationSettings:
    """Settings with a seed of its own for each choice."""
    if settings.seed is None or settings.deterministic or not index:
        return settings
    return dataclasses.replace(settings, seed=(settings.seed + index) % _SEEDS)
