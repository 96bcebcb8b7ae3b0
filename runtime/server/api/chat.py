"""`POST /v1/chat/completions`: reading the body, and the answer as a whole or in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...results import Chunk, FinishReason
from ...settings import GenerationSettings
from ..context import ServerContext, context_of
from ..http.body import read_fields
from ..http.errors import invalid
from ..http.fields import Fields
from ..http.streams import DONE, EventStream, event
from ..models import Lease
from ..settings import ServerSettings
from ..tools.declared import tools_of
from ..tools.parser import AnswerParser, Call, Part, Words
from .answers import timings_of, wire_reason
from .logprobs import chat_entries
from .messages import messages_of
from .prompting import ChatPrompt, Reading, options_of, render
from .sampling import chat_logprobs, count_of, max_tokens_of, settings_of, streaming_of, structure_of
from .work import Work, error_event, new_id, respond, with_room

# Fields that ask for something this server does not have, and what to do instead.
_REFUSED = {
    "store": "nothing is kept here; leave it out",
    "audio": "answers are text; leave it out",
    "functions": "declare them in tools",
    "function_call": "use tool_choice",
    "web_search_options": "there is no search; leave it out",
}


@dataclass(frozen=True)
class ChatRequest:
    """A checked body. It knows nothing of the model yet."""

    model: str | None
    prompt: ChatPrompt
    settings: GenerationSettings
    max_tokens: int | None
    choices: int
    stream: bool
    include_usage: bool


def read_chat(fields: Fields, limits: ServerSettings) -> ChatRequest:
    """Read and check a body. Raises: ApiError; SettingsError."""
    fields.refuse(_REFUSED)
    if any(item != "text" for item in fields.items("modalities") or []):
        raise invalid("modalities must be ['text']: answers are text", "modalities", "unsupported_parameter")
    tools, structure = tools_of(fields), structure_of(fields.inner("response_format"))
    if tools is not None and tools.mode == "required" and structure:
        raise invalid("response_format and a tool_choice that asks for a call exclude each other", "response_format")
    max_tokens = max_tokens_of(fields, "max_completion_tokens", "max_tokens")
    settings = dataclasses.replace(settings_of(fields, max_tokens), logprobs=chat_logprobs(fields), **structure)
    stream, with_usage = streaming_of(fields)
    return ChatRequest(
        fields.text("model"),
        ChatPrompt(
            messages_of(fields),
            tools,
            options_of(fields),
            fields.text("reasoning_effort"),
            structured=settings.structured,
        ),
        settings,
        max_tokens,
        count_of(fields, limits.max_choices),
        stream,
        with_usage,
    )


async def chat_completions(request: Request) -> Response | EventStream:
    """The endpoint. Raises: ApiError, SettingsError, ClientGoneError."""
    context = context_of(request)
    asked = read_chat(await read_fields(request, context.settings), context.settings)
    lease = await context.models.lease(asked.model)
    return await respond(
        request,
        context,
        lease,
        lambda: ChatAnswer(asked, *start_chat(asked, lease, context)),
        stream=asked.stream,
        prompt="messages",
    )


def start_chat(asked: ChatRequest, lease: Lease, context: ServerContext) -> tuple[Work, Reading]:
    """Render the messages and start the answers. Raises: ApiError, EdgelmError."""
    ids, reading = render(lease, asked.prompt)
    room = with_room(lease, ids, asked.max_tokens, context.settings.max_tokens)
    settings = dataclasses.replace(
        asked.settings, max_tokens=room, min_tokens=min(asked.settings.min_tokens, room), **reading.settings
    )
    context.log_prompt(lease.name, lease.engine.tokenizer.decode(ids))
    return Work(lease, [ids], settings, asked.choices, context), reading


class ChatAnswer:
    """The choices of one request, as OpenAI's `chat.completion` or its chunks."""

    def __init__(self, asked: ChatRequest, work: Work, reading: Reading) -> None:
        self.work = work
        self._asked = asked
        self._id = new_id("chatcmpl-")
        self._choices = [_Choice(work, reading.parser(), asked.settings.logprobs) for _ in range(work.count)]

    async def whole(self) -> dict[str, Any]:
        """The body `chat.completion`."""
        async for index, chunk in self.work.chunks():
            self._choices[index].add(chunk)
        choices = [{"index": index, **choice.message()} for index, choice in enumerate(self._choices)]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self.work.usage(),
            "timings": timings_of(self.work.stats[0]),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks: the role, the deltas, the finish reason, and the usage if it was asked for."""
        for index in range(self.work.count):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, chunk in self.work.chunks():
            choice = self._choices[index]
            for delta, logprobs in choice.add(chunk):
                yield self._chunk(index, delta, logprobs)
            if chunk.stats is not None:
                yield self._chunk(index, {}, None, choice.reason, {"timings": timings_of(chunk.stats)})
        if self._asked.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.work.usage()})
        yield DONE

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error in the middle of a stream."""
        return error_event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        work = self.work
        return {
            "id": self._id,
            "object": kind,
            "created": work.created,
            "model": work.model,
            "system_fingerprint": work.fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._asked.include_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **(more or {})})


class _Choice:
    """One choice as it grows."""

    def __init__(self, work: Work, parser: AnswerParser, logprobs: int | None) -> None:
        self._tokenizer = work.tokenizer
        self._parser = parser
        self._logprobs: list[dict[str, Any]] | None = None if logprobs is None else []
        self._waiting: list[dict[str, Any]] = []
        self._texts = {"content": "", "reasoning": ""}
        self._calls: list[Call] = []
        self._finished: FinishReason | None = None

    def add(self, chunk: Chunk) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
        """The deltas of a chunk, each with its log-probabilities."""
        parts = self._parser.add(chunk.text)
        if chunk.finish_reason is not None:
            self._finished = chunk.finish_reason
            parts += self._parser.finish()
        deltas: list[dict[str, Any]] = [self._delta(part) for part in parts]
        if self._logprobs is None:
            return [(delta, None) for delta in deltas]
        entries = chat_entries(self._tokenizer, chunk.logprobs)
        self._logprobs += entries
        self._waiting += entries
        if not deltas and self._finished is not None and self._waiting:
            deltas = [{"content": ""}]
        return [(delta, self._taken() if index == 0 else None) for index, delta in enumerate(deltas)]

    @property
    def reason(self) -> str:
        """The finish reason, by OpenAI's names."""
        assert self._finished is not None, "the last chunk of an answer has the reason"
        return wire_reason(self._finished, bool(self._calls))

    def message(self) -> dict[str, Any]:
        """The whole choice except its index."""
        message: dict[str, Any] = {"role": "assistant", "content": self._texts["content"], "refusal": None}
        if self._texts["reasoning"]:
            message["reasoning_content"] = self._texts["reasoning"]
        if self._calls:
            message["content"] = self._texts["content"] or None
            message["tool_calls"] = [call_object(call) for call in self._calls]
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        return {"message": message, "logprobs": logprobs, "finish_reason": self.reason}

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Words):
            self._texts[part.kind] += part.text
            return {"content" if part.kind == "content" else "reasoning_content": part.text}
        self._calls.append(part)
        return {"tool_calls": [{"index": len(self._calls) - 1, **call_object(part)}]}

    def _taken(self) -> dict[str, Any]:
        taken, self._waiting = self._waiting, []
        return {"content": taken, "refusal": None}


def call_object(call: Call) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
