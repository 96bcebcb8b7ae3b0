"""A response of `POST /v1/responses`: its items, whole or as events in OpenAI's order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

from ...results import Chunk
from ..http.fields import Fields
from ..http.streams import event
from ..tools.parser import Call, Part
from .chat import ChatRequest
from .logprobs import chat_entries
from .prompting import Reading
from .work import Work, new_id

# Fields of the request that a response repeats, with their defaults.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": None,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


class ResponseAnswer:
    """One response."""

    def __init__(self, fields: Fields, asked: ChatRequest, work: Work, reading: Reading) -> None:
        self.work = work
        self._asked = asked
        self._parser = reading.parser()
        self._repeated = {
            name: value if fields.values.get(name) is None else fields.values[name] for name, value in _REPEATED.items()
        }
        self._id = new_id("resp_")
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None
        self._reason: str | None = None
        self._sequence = 0
        self._logprobs: list[dict[str, Any]] = []

    async def whole(self) -> dict[str, Any]:
        """The body `response`."""
        async for _, chunk in self.work.chunks():
            for _ in self._events_of(chunk):
                pass
        return self._response(self._status())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events: created, in progress, the growing items, and at the end the whole response."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, {"response": self._response("in_progress")})
        async for _, chunk in self.work.chunks():
            for data in self._events_of(chunk):
                yield data
        status = self._status()
        yield self._event(f"response.{status}", {"response": self._response(status)})

    def failure(self, body: dict[str, Any]) -> bytes:
        """An error in the middle of a stream: the event that the response failed."""
        error = {"code": "server_error", "message": body["error"]["message"]}
        return self._event("response.failed", {"response": {**self._response("failed"), "error": error}})

    def _events_of(self, chunk: Chunk) -> Iterator[bytes]:
        if self._asked.settings.logprobs is not None:
            self._logprobs += chat_entries(self.work.tokenizer, chunk.logprobs)
        for part in self._parser.add(chunk.text):
            yield from self._part(part)
        if chunk.finish_reason is not None:
            self._reason = chunk.finish_reason
            for part in self._parser.finish():
                yield from self._part(part)
            if not self._items:
                yield from self._begin("content")
            yield from self._end()

    def _part(self, part: Part) -> Iterator[bytes]:
        if isinstance(part, Call):
            yield from self._end()
            yield from self._call(part)
            return
        if self._open != part.kind:
            yield from self._end()
            yield from self._begin(part.kind)
        item = self._items[-1]
        item["content"][0]["text"] += part.text
        name = "response.output_text.delta" if part.kind == "content" else "response.reasoning_text.delta"
        more: dict[str, Any] = {"logprobs": []} if part.kind == "content" else {}
        yield self._event(name, {**self._place(), "content_index": 0, "delta": part.text, **more})

    def _begin(self, kind: str) -> Iterator[bytes]:
        self._open = kind
        if kind == "content":
            item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "in_progress"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "status": "in_progress"}  # type: ignore[dict-item]
            part = {"type": "reasoning_text", "text": ""}
        self._items.append({**item, "content": []})
        yield self._event("response.output_item.added", {"output_index": self._last, "item": self._items[-1]})
        self._items[-1]["content"].append(part)
        yield self._event("response.content_part.added", {**self._place(), "content_index": 0, "part": part})

    def _end(self) -> Iterator[bytes]:
        if self._open is None:
            return
        item, kind, self._open = self._items[-1], self._open, None
        part = item["content"][0]
        item["status"] = "completed" if self._reason in (None, "stop") else "incomplete"
        place = {**self._place(), "content_index": 0}
        if kind == "content":
            part["logprobs"] = self._logprobs
            yield self._event(
                "response.output_text.done", {**place, "text": part["text"], "logprobs": part["logprobs"]}
            )
        else:
            yield self._event("response.reasoning_text.done", {**place, "text": part["text"]})
        yield self._event("response.content_part.done", {**place, "part": part})
        yield self._event("response.output_item.done", {"output_index": self._last, "item": item})

    def _call(self, call: Call) -> Iterator[bytes]:
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        yield self._event("response.output_item.added", {"output_index": self._last, "item": item})
        yield self._event("response.function_call_arguments.delta", {**self._place(), "delta": call.arguments})
        item.update(arguments=call.arguments, status="completed")
        done = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", {**self._place(), **done})
        yield self._event("response.output_item.done", {"output_index": self._last, "item": item})

    @property
    def _last(self) -> int:
        return len(self._items) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": self._last}

    def _event(self, name: str, more: dict[str, Any]) -> bytes:
        data = event({"type": name, "sequence_number": self._sequence, **more}, name)
        self._sequence += 1
        return data

    def _status(self) -> str:
        return "completed" if self._reason == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        usage = None
        if status in ("completed", "incomplete"):
            found = self.work.usage()
            usage = {
                "input_tokens": found["prompt_tokens"],
                "input_tokens_details": {**found["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": found["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": found["total_tokens"],
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.work.created,
            "model": self.work.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "usage": usage,
            "previous_response_id": None,
            "store": False,
            **self._repeated,
        }
