"""`POST /v1/completions`: texts or token ids, continued."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...errors import shown
from ...results import Chunk
from ...settings import GenerationSettings
from ..context import ServerContext, context_of
from ..http.body import read_fields
from ..http.errors import invalid, unsupported
from ..http.fields import Fields
from ..http.streams import DONE, EventStream, event
from ..models import Lease
from ..settings import ServerSettings
from .answers import timings_of, wire_reason
from .logprobs import completion_entries
from .sampling import count_of, max_tokens_of, settings_of, streaming_of, structure_of
from .work import Work, error_event, new_id, respond, with_room

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_LOGPROBS = 20
_MAX_PROMPTS = 64
_REFUSED = {"suffix": "the model continues a text and fills no gap"}


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body. It knows nothing of the model yet."""

    model: str | None
    prompts: list[str | list[int]]
    settings: GenerationSettings
    max_tokens: int
    choices: int
    echo: bool
    stream: bool
    include_usage: bool


def read_completion(fields: Fields, limits: ServerSettings) -> CompletionRequest:
    """Read and check a body. Raises: ApiError; SettingsError."""
    fields.refuse(_REFUSED)
    choices, logprobs = count_of(fields, limits.max_choices), fields.whole("logprobs", 0, _MAX_LOGPROBS)
    if (fields.whole("best_of", 1) or choices) > choices:
        raise unsupported("best_of", "every answer is sent; use n")
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise unsupported("echo with logprobs", "the prompt's own log-probabilities are not computed; leave one out")
    stream, with_usage = streaming_of(fields)
    structure = structure_of(fields.inner("response_format"))
    max_tokens = max_tokens_of(fields, "max_tokens", "max_completion_tokens") or limits.max_tokens
    max_tokens = max_tokens or _DEFAULT_MAX_TOKENS
    return CompletionRequest(
        fields.text("model"),
        _prompts(fields),
        dataclasses.replace(settings_of(fields, max_tokens), logprobs=logprobs, **structure),
        max_tokens,
        choices,
        echo,
        stream,
        with_usage,
    )


async def completions(request: Request) -> Response | EventStream:
    """The endpoint. Raises: ApiError, SettingsError, ClientGoneError."""
    context = context_of(request)
    asked = read_completion(await read_fields(request, context.settings), context.settings)
    lease = await context.models.lease(asked.model)
    return await respond(
        request, context, lease, lambda: CompletionAnswer(asked, lease, context), stream=asked.stream, prompt="prompt"
    )


class CompletionAnswer:
    """The choices of one request, as OpenAI's `text_completion`."""

    def __init__(self, asked: CompletionRequest, lease: Lease, context: ServerContext) -> None:
        """Start the answers. Raises: ApiError, EdgelmError."""
        ids = [encode(lease, prompt) for prompt in asked.prompts]
        for tokens in ids:
            with_room(lease, tokens, asked.max_tokens, None)
            context.log_prompt(lease.name, lease.engine.tokenizer.decode(tokens))
        self.work = Work(lease, ids, asked.settings, asked.choices, context)
        self._asked = asked
        self._id = new_id("cmpl-")
        # The text in front of the answer: the prompt if it is echoed.
        echoed = [lease.engine.tokenizer.decode(tokens) if asked.echo else "" for tokens in ids]
        self._echoed = [text for text in echoed for _ in range(asked.choices)]
        self._lengths = [len(text) for text in self._echoed]

    async def whole(self) -> dict[str, Any]:
        """The body `text_completion`."""
        chunks: list[list[Chunk]] = [[] for _ in range(self.work.count)]
        async for index, chunk in self.work.chunks():
            chunks[index].append(chunk)
        choices = [self._choice(index, parts, self._echoed[index]) for index, parts in enumerate(chunks)]
        timings = timings_of(self.work.stats[0])
        return {**self._head(), "choices": choices, "usage": self.work.usage(), "timings": timings}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks: the prompt if it is echoed, the texts, and the usage if it was asked for."""
        usage = {"usage": None} if self._asked.include_usage else {}
        for index, text in enumerate(self._echoed):
            if text:
                yield event({**self._head(), "choices": [_text_choice(index, text)], **usage})
        async for index, chunk in self.work.chunks():
            timings = {} if chunk.stats is None else {"timings": timings_of(chunk.stats)}
            yield event({**self._head(), "choices": [self._choice(index, [chunk], "")], **usage, **timings})
        if self._asked.include_usage:
            yield event({**self._head(), "choices": [], "usage": self.work.usage()})
        yield DONE

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error in the middle of a stream."""
        return error_event(body)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self.work.created,
            "model": self.work.model,
            "system_fingerprint": self.work.fingerprint,
        }

    def _choice(self, index: int, chunks: Sequence[Chunk], echoed: str) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in chunks)
        last = chunks[-1].finish_reason
        found = _text_choice(index, echoed + text)
        if self._asked.settings.logprobs is not None:
            entries = [entry for chunk in chunks for entry in chunk.logprobs]
            found["logprobs"] = completion_entries(self.work.tokenizer, entries, self._lengths[index])
        self._lengths[index] += len(text)
        found["finish_reason"] = None if last is None else wire_reason(last)
        return found


def encode(lease: Lease, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt. Raises: PromptError."""
    if isinstance(prompt, str):
        return lease.engine.encode(prompt)
    return lease.engine.encode(token_ids=prompt)


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _prompts(fields: Fields) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids. Raises: ApiError."""
    value = fields.values.get("prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid(f"prompt must be a text, token ids or a list of them, found {shown(value)}", "prompt")
    prompts = [value] if _is_ids(value) else value
    if len(prompts) > _MAX_PROMPTS:
        raise invalid(f"there are {len(prompts)} prompts: give at most {_MAX_PROMPTS}", "prompt")
    for item in prompts:
        if not isinstance(item, str) and not _is_ids(item):
            raise invalid(f"prompt must hold texts, or lists of token ids, found {shown(item)}", "prompt")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
