"""The arguments of earlier calls in the form that a chat template takes: an object, or its JSON text.

OpenAI's messages have text. Most templates write `arguments | tojson`, or iterate over the items, so they need an
object. Some join texts: they would fail with an object, or show its Python repr. So both forms are tried on the
template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import PromptError, TemplateError
from ..models import Lease

_PROBE = {"edgelm_probe": "x"}
_PYTHONS = "{'edgelm_probe'"
_JSON = '"edgelm_probe"'


def as_template_takes_them(lease: Lease, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have objects as arguments, or texts if the template needs those. Cost, if there are calls:
    rendering one or two short conversations."""
    if not any(message.get("tool_calls") for message in messages) or not _takes_texts(lease):
        return list(messages)
    return [_with_texts(message) for message in messages]


def _takes_texts(lease: Lease) -> bool:
    """Whether a template shows arguments given as text, and not those given as an object."""
    shown = _shown(lease, _PROBE)
    if shown is not None and _PYTHONS not in shown:
        return False
    return _JSON in (_shown(lease, json.dumps(_PROBE)) or "")


def _shown(lease: Lease, arguments: Any) -> str | None:
    """The prompt of a conversation with a call, or None if the template refuses it."""
    call = {"id": "edgelm001", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "edgelm001", "name": "probe", "content": "b"},
    ]
    try:
        return lease.engine.tokenizer.decode(lease.engine.encode(messages=messages), special=True)
    except (TemplateError, PromptError):
        return None


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": _with_text(call["function"])} for call in calls]}


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
