"""Messages as callers send them: checked, and brought to the form in which chat templates are given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError, shown

Message = Mapping[str, Any]

# The names under which a message's reasoning comes. transformers fills in those that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: object) -> None:
    """Raises: PromptError for what is no list of objects."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f'messages must be a list of objects such as {{"role": "user", "content": "..."}}, found '
            f"{shown(messages)}: put a single message into a list"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f'message {index} must be an object such as {{"role": "user", "content": "..."}}, found '
                f"{shown(message)}"
            )


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """New dicts, as transformers' `apply_chat_template` hands them to a template.

    Keys whose value is None are left out: OpenAI's clients send `content: None` beside tool calls, and a template
    would print it. Reasoning is there under all names that templates read.
    """
    return [_with_reasoning({key: value for key, value in item.items() if value is not None}) for item in messages]


def joined_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages whose contents are texts: the text parts of a list are joined. Raises: PromptError, naming a part of
    another type, which a model of text cannot read."""
    return [
        {**message, "content": "".join(_texts(index, message["content"]))}
        if isinstance(message.get("content"), list | tuple)
        else dict(message)
        for index, message in enumerate(messages)
    ]


def has_parts(messages: Sequence[Message]) -> bool:
    """Whether a content is a list."""
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
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
