"""Check a chat's messages, and convert them from OpenAI's form to the one that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..http.errors import invalid, unsupported
from ..http.fields import Fields
from ..tools.declared import Tools
from ..tools.formats import CallFormat

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEPT = ("name", "reasoning_content", "reasoning", "thinking", "tool_call_id")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_OTHER_PARTS = {
    "image_url": "an image",
    "input_image": "an image",
    "input_audio": "sound",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}
_MAX_MESSAGES = 10_000


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """`messages`, each with its role and contents of text. Raises: ApiError, naming the field that is wrong."""
    items = fields.items("messages")
    if not items:
        raise invalid("messages is missing or empty: give at least one message", "messages")
    if len(items) > _MAX_MESSAGES:
        raise invalid(f"there are {len(items):,} messages: give at most {_MAX_MESSAGES:,}", "messages")
    return [_message(Fields(item, f"messages[{index}]")) for index, item in enumerate(items)]


def _message(item: Fields) -> dict[str, Any]:
    role = item.choice("role", _ROLES)
    if role is None:
        raise invalid(f"{item.name('role')} is missing: give system, user, assistant or tool", item.name("role"))
    message: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    content = content_of(item, "content")
    calls = item.items("tool_calls")
    if content is None and not calls and role != "assistant":
        raise invalid(f"{item.name('content')} is missing: give a text", item.name("content"))
    if content is not None or not calls:
        message["content"] = content if content is not None else item.text("refusal") or ""
    if calls:
        message["tool_calls"] = [
            _call(Fields(call, f"{item.name('tool_calls')}[{index}]")) for index, call in enumerate(calls)
        ]
    return message | {name: text for name in _KEPT if (text := item.text(name)) is not None}


def content_of(item: Fields, field: str) -> str | list[dict[str, str]] | None:
    """The content of a message: a text, or a list of text parts. Raises: ApiError for images, sound and files."""
    value = item.values.get(field)
    if value is None or isinstance(value, str):
        return value
    parts = item.items(field) or []
    return [_part(Fields(part, f"{item.name(field)}[{index}]")) for index, part in enumerate(parts)]


def _part(part: Fields) -> dict[str, str]:
    kind = part.text("type")
    if kind in _OTHER_PARTS:
        raise unsupported(part.path, f"it is {_OTHER_PARTS[kind]}, and the model reads text: send parts of type 'text'")
    if kind not in _TEXT_PARTS:
        raise invalid(f"{part.name('type')} must be 'text', found {kind!r:.40}", part.name("type"))
    return {"type": "text", "text": part.needed_text("refusal" if kind == "refusal" else "text")}


def _call(call: Fields) -> dict[str, Any]:
    function = call.inner("function")
    if function is None:
        raise invalid(f"{call.name('function')} is missing: give its name and arguments", call.name("function"))
    return {
        "id": call.text("id") or "",
        "type": "function",
        "function": {"name": function.needed_text("name"), "arguments": arguments_of(function)},
    }


def arguments_of(function: Fields) -> dict[str, Any]:
    """The arguments as an object, from the JSON text in the request. Raises: ApiError."""
    text = function.values.get("arguments")
    try:
        value = json.loads(text or "{}") if isinstance(text, str | None) else text
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise invalid(
            f"{function.name('arguments')} must be the text of a JSON object, found {text!r:.60}",
            function.name("arguments"),
        )
    return value


def without_template_calls(
    messages: Sequence[dict[str, Any]], tools: Tools | None, form: CallFormat
) -> list[dict[str, Any]]:
    """Messages for a template without tools: a system message describes the tools; calls and results become texts."""
    told = [_as_text(message, form) for message in messages]
    if tools is None:
        return told
    about = _instructions(tools, form)
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{text_of(told[0]['content'])}\n\n{about}"}, *told[1:]]
    return [{"role": "system", "content": about}, *told]


def text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """A content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _as_text(message: dict[str, Any], form: CallFormat) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text_of(message['content'])}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    objects = [{"name": call["function"]["name"], form.key: call["function"]["arguments"]} for call in calls]
    written = [f"{form.begin}\n{json.dumps(item, ensure_ascii=False)}\n{form.end}" for item in objects]
    return {"role": "assistant", "content": "\n".join([*filter(None, [text_of(message.get("content", ""))]), *written])}


def _instructions(tools: Tools, form: CallFormat) -> str:
    functions = "\n".join(json.dumps(tool.definition["function"], ensure_ascii=False) for tool in tools.declared)
    return (
        f"You can call these functions:\n{functions}\n\nTo call one, answer with\n"
        f'{form.begin}\n{{"name": "the function\'s name", "{form.key}": {{the arguments}}}}\n{form.end}\n'
        "What it returns comes in the next message, between <tool_response> and </tool_response>."
    )
