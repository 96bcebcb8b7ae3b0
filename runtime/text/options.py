"""The caller's options for a chat template, besides the messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..errors import PromptError, shown
from .plain_data import plain

# Variables that the template gets anyway, so template_variables cannot set them.
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


class ChatKeywords(TypedDict, total=False):
    """The options as keywords of `Engine.generate` and its siblings; `ChatOptions` says what each means."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    template_variables: Mapping[str, Any]
    continue_final_message: bool | str
    tokens_in_messages: bool


@dataclass(frozen=True)
class ChatOptions:
    """Options for messages. The names are those of transformers' `apply_chat_template`, where it has them.

    tools: descriptions of functions that the model may call, each an object such as OpenAI's
    `{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}`.
    documents: objects with title and text, for templates that show them.
    template_variables: other variables of the template, such as `{"enable_thinking": False}`.
    continue_final_message: the answer continues the last message instead of beginning a new one; a text names the field
    to continue (default: content).
    tokens_in_messages: read special tokens in messages as tokens. False: as plain text, so that the author of a message
    cannot forge its end or another role.
    Raises: PromptError.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool | str = False
    tokens_in_messages: bool = False

    def __post_init__(self) -> None:
        for name in ("tools", "documents"):
            object.__setattr__(self, name, _objects(name, getattr(self, name)))
        object.__setattr__(self, "template_variables", _variables(self.template_variables))
        if not isinstance(self.continue_final_message, bool | str):
            found = shown(self.continue_final_message)
            raise PromptError(f"continue_final_message must be True, False or the name of a field, found {found}")
        if not isinstance(self.tokens_in_messages, bool):
            raise PromptError(f"tokens_in_messages must be True or False, found {shown(self.tokens_in_messages)}")

    @staticmethod
    def split(keywords: Mapping[str, Any]) -> tuple[ChatOptions, dict[str, Any]]:
        """The options among the keywords of a request, and the other keywords. Raises: PromptError."""
        own = {name: value for name, value in keywords.items() if name in OPTION_NAMES}
        return (ChatOptions(**own) if own else NO_OPTIONS), {k: v for k, v in keywords.items() if k not in own}

    @property
    def given(self) -> list[str]:
        """The names of the options that are not at their defaults."""
        return [name for name in OPTION_NAMES if getattr(self, name) != getattr(NO_OPTIONS, name)]


OPTION_NAMES = tuple(item.name for item in dataclasses.fields(ChatOptions))


def _objects(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    found = plain(value)
    if not isinstance(found, list | tuple) or not all(isinstance(item, dict) for item in found):
        raise PromptError(f"{name} must be a list of objects, found {shown(value)}: describe each as an object")
    return list(found)


def _variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise PromptError(f"template_variables must map names to values, found {shown(value)}")
    for name in value:
        if name in OWN_VARIABLES:
            raise PromptError(f"{name!r} is not a template variable, but an argument of its own: give it there")
    return {name: plain(item) for name, item in value.items()}


NO_OPTIONS = ChatOptions()
