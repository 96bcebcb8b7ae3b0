"""`POST /v1/responses`: reading the body as a chat request. Nothing is kept between requests."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..context import context_of
from ..http.body import read_fields
from ..http.errors import invalid, unsupported
from ..http.fields import Fields
from ..http.streams import EventStream
from ..settings import ServerSettings
from ..tools.declared import tools_of
from .chat import ChatRequest, start_chat
from .messages import arguments_of, content_of
from .prompting import ChatPrompt, options_of
from .response_answer import ResponseAnswer
from .sampling import MAX_TOP_LOGPROBS, max_tokens_of, settings_of, structure_of
from .work import respond

_REFUSED = {
    "previous_response_id": "nothing is kept here; send the whole conversation in input",
    "conversation": "nothing is kept here; send the whole conversation in input",
    "background": "answers are sent when they are there; use stream",
    "prompt": "there are no stored prompts; use instructions and input",
    "store": "nothing is kept here; leave it out, or send false",
}
_ROLES = ("system", "developer", "user", "assistant")


def read_response(fields: Fields, limits: ServerSettings) -> ChatRequest:
    """Read and check a body. Raises: ApiError; SettingsError."""
    fields.refuse(_REFUSED)
    if fields.choice("truncation", ("auto", "disabled")) == "auto":
        raise unsupported("truncation", "no message is dropped; shorten the input, or send 'disabled'")
    text = fields.inner("text")
    structure = structure_of(text.inner("format")) if text is not None else {}
    tools = tools_of(fields, flat=True)
    if tools is not None and tools.mode == "required" and structure:
        raise invalid("text.format and a tool_choice that asks for a call exclude each other", "text")
    logprobs = None
    if "message.output_text.logprobs" in (fields.items("include") or []):
        logprobs = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    max_tokens = max_tokens_of(fields, "max_output_tokens")
    reasoning = fields.inner("reasoning")
    effort = None if reasoning is None else reasoning.text("effort")
    settings = dataclasses.replace(settings_of(fields, max_tokens), logprobs=logprobs, **structure)
    return ChatRequest(
        fields.text("model"),
        ChatPrompt(_messages(fields), tools, options_of(fields), effort, structured=settings.structured),
        settings,
        max_tokens,
        1,
        fields.flag("stream"),
        True,
    )


async def responses(request: Request) -> Response | EventStream:
    """The endpoint. Raises: ApiError, SettingsError, ClientGoneError."""
    context = context_of(request)
    fields = await read_fields(request, context.settings)
    asked = read_response(fields, context.settings)
    lease = await context.models.lease(asked.model)
    return await respond(
        request,
        context,
        lease,
        lambda: ResponseAnswer(fields, asked, *start_chat(asked, lease, context)),
        stream=asked.stream,
        prompt="input",
    )


def _messages(fields: Fields) -> list[dict[str, Any]]:
    instructions, given = fields.text("instructions"), fields.values.get("input")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    items = fields.items("input")
    if not items:
        raise invalid("input is missing or empty: give a text or a list of items", "input")
    for index, item in enumerate(items):
        _add_item(messages, Fields(item, f"input[{index}]"))
    return messages


def _add_item(messages: list[dict[str, Any]], item: Fields) -> None:
    kind = item.text("type") or "message"
    if kind == "message":
        role, content = item.choice("role", _ROLES), content_of(item, "content")
        if role is None or content is None:
            raise invalid(f"{item.path} must have a role and a content", item.path)
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call":
        function = {"name": item.needed_text("name"), "arguments": arguments_of(item)}
        call = {"id": item.needed_text("call_id"), "type": "function", "function": function}
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.values.get("output")
        text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
        messages.append({"role": "tool", "tool_call_id": item.needed_text("call_id"), "content": text})
    elif kind != "reasoning":  # earlier thoughts of the model, which templates leave out
        raise unsupported(item.name("type"), f"there are messages and calls of functions, found {kind!r:.40}")
