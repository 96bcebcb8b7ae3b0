"""Going on with the last message in place of a new one: where the prompt ends, found as transformers finds it.

The message gets a mark at its end before the template runs, and the prompt is cut where the mark is. What the template
writes behind a message, such as the end of a turn, is thereby left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PromptError, TemplateError, shown
from .messages import REASONING
from .options import ChatOptions

# transformers' mark. The blank at its end tells whether the template strips messages.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_DEFAULT = "content"


def field_to_continue(options: ChatOptions) -> str | None:
    """The field of the last message that is to go on, or None where a new message begins."""
    chosen = options.continue_final_message
    return chosen if isinstance(chosen, str) and chosen else _DEFAULT if chosen else None


def mark_end(messages: list[dict[str, Any]], field: str, template: str) -> str:
    """Put the mark behind the last message, whose text is returned. The list is changed, the values in it are not.

    Raises: PromptError, TemplateError, where there is nothing that this template could show.
    """
    final = messages[-1] if messages else {}
    value = final.get(field)
    if value is None:
        raise PromptError(f"continue_final_message: the last message has no {shown(field)} to go on with")
    # Reasoning is there under several names, of which a template reads one.
    fields = [name for name in REASONING if final.get(name) == value] if field in REASONING else [field]
    if not any(name in template for name in fields):
        raise TemplateError(f"the model's chat template shows no {shown(field)}, so a message cannot go on there")
    text, marked = _marked(value)
    messages[-1] = {**final, **dict.fromkeys(fields, marked)}
    return text


def cut_at_mark(prompt: str, text: str) -> str:
    """The prompt up to the mark. Raises: TemplateError for a template that does not show the message as it is."""
    mark = _MARK.strip()
    if text.strip() not in prompt or mark not in prompt:
        raise TemplateError("the model's chat template changes the last message, so the answer cannot go on with it")
    place = prompt.rindex(mark)
    # A template that strips messages strips the blank, and what the message ends in.
    return prompt[:place] if prompt[place : place + len(_MARK)] == _MARK else prompt[:place].rstrip()


def _marked(value: Any) -> tuple[str, Any]:
    """The text that goes on, and the value with the mark."""
    if isinstance(value, str):
        return value, value + _MARK
    parts = list(value) if isinstance(value, list | tuple) else []
    for index in range(len(parts) - 1, -1, -1):
        text = parts[index].get("text") if isinstance(parts[index], Mapping) else None
        if isinstance(text, str):
            parts[index] = {**parts[index], "text": text + _MARK}
            return text, parts
    raise PromptError("continue_final_message: the last message has no text to go on with")
