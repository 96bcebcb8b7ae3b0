"""Check callers' messages, and convert them to the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError, shown
from .plain_data import plain

Message = Mapping[str, Any]

# The fields that may hold a message's reasoning. As in transformers, all of them are filled, since templates differ.
REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """New dicts of plain data without keys whose value is None, as in transformers' `apply_chat_template`: OpenAI's
    clients send `content: None` with tool calls, and a template would print it.

    messages: mappings, or objects that convert to plain data, such as those that OpenAI's clients return.
    Raises: PromptError for anything else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f'messages must be a list of objects such as {{"role": "user", "content": "..."}}, found '
            f"{shown(messages)}: put a single message into a list"
        )
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: object) -> dict[str, Any]:
    found = plain(message)
    if not isinstance(found, dict):
        raise PromptError(
            f'message {index} must be an object such as {{"role": "user", "content": "..."}}, found {shown(message)}'
        )
    return {key: value for key, value in found.items() if value is not None}


def with_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """New dicts with a message's reasoning in all fields that templates read."""
    return [_with_reasoning(dict(message)) for message in messages]


def joined_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages whose contents are texts: lists of text parts are joined. Raises: PromptError for a part of another
    type."""
    return [
        {**message, "content": "".join(_texts(index, message["content"]))}
        if isinstance(message.get("content"), list | tuple)
        else dict(message)
        for index, message in enumerate(messages)
    ]


def has_parts(messages: Sequence[Message]) -> bool:
    """Whether any content is a list."""
    return any(isinstance(message.get("content"), list | tuple) for message in messages)


def _texts(index: int, parts: Sequence[Any]) -> list[str]:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise PromptError(f"message {index} has a part of type {shown(kind)}: the model reads parts of type 'text'")
        texts.append(text)
    return texts


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
