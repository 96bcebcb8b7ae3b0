"""Continue the last message instead of beginning a new one: find where the prompt ends, as transformers does.

The message gets a mark at its end before the template runs, and the prompt is cut at the mark. This removes what the
template writes behind a message, such as the end of a turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PromptError, TemplateError, shown
from .messages import REASONING
from .options import ChatOptions

# transformers' mark. The blank at its end shows whether the template strips messages.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_DEFAULT = "content"


def field_to_continue(options: ChatOptions) -> str | None:
    """The field of the last message to continue, or None if a new message begins."""
    chosen = options.continue_final_message
    return chosen if isinstance(chosen, str) and chosen else _DEFAULT if chosen else None


def mark_end(messages: list[dict[str, Any]], field: str, template: str) -> str:
    """Put the mark behind the last message. Returns its text. Changes the list, but not the messages in it.

    Raises: PromptError if there is no text to continue; TemplateError if the template does not show the field.
    """
    final = messages[-1] if messages else {}
    value = final.get(field)
    if value is None:
        raise PromptError(f"continue_final_message: the last message has no {shown(field)} to go on with")
    # Reasoning is stored under several names, of which a template reads one.
    fields = [name for name in REASONING if final.get(name) == value] if field in REASONING else [field]
    if not any(name in template for name in fields):
        raise TemplateError(f"the model's chat template shows no {shown(field)}, so a message cannot go on there")
    text, marked = _marked(value)
    messages[-1] = {**final, **dict.fromkeys(fields, marked)}
    return text


def cut_at_mark(prompt: str, text: str) -> str:
    """The prompt up to the mark. Raises: TemplateError if the template changes the message."""
    mark = _MARK.strip()
    if text.strip() not in prompt or mark not in prompt:
        raise TemplateError("the model's chat template changes the last message, so the answer cannot go on with it")
    place = prompt.rindex(mark)
    # A template that strips messages strips the mark's blank, and would strip the end of the message.
    return prompt[:place] if prompt[place : place + len(_MARK)] == _MARK else prompt[:place].rstrip()


def _marked(value: Any) -> tuple[str, Any]:
    """The text to continue, and the content with the mark."""
    if isinstance(value, str):
        return value, value + _MARK
    parts = list(value) if isinstance(value, list | tuple) else []
    for index in range(len(parts) - 1, -1, -1):
        text = parts[index].get("text") if isinstance(parts[index], Mapping) else None
        if isinstance(text, str):
            parts[index] = {**parts[index], "text": text + _MARK}
            return text, parts
    raise PromptError("continue_final_message: the last message has no text to go on with")
