"""Messages to token ids by a model's chat template, and how to read calls and thoughts in the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...text.tokenizer import Tokenizer
from ..http.errors import invalid
from ..http.fields import Fields
from ..models import Lease
from ..tools.declared import Tools
from ..tools.formats import CallFormat, find_format
from ..tools.grammar import Thinking, call_grammar
from ..tools.parser import AnswerParser
from .call_arguments import as_template_takes_them
from .messages import without_template_calls

_THINK = "<think>"
# Tokens at the end of a prompt to search for the mark that opens a thought; blanks may follow it.
_TAIL = 4


@dataclass(frozen=True)
class ChatPrompt:
    """Messages, and the template's other inputs. options: keywords of `Engine.encode`; effort: how much the model
    should think, for templates with such a variable; structured: the answer follows a schema, so it holds no calls."""

    messages: list[dict[str, Any]]
    tools: Tools | None = None
    options: dict[str, Any] = field(default_factory=dict)
    effort: str | None = None
    structured: bool = False


@dataclass(frozen=True)
class Reading:
    """How to read the answers to a prompt. settings: generation settings that this needs, besides the request's own."""

    form: CallFormat | None
    names: frozenset[str]
    thinks: bool
    begun: bool
    settings: dict[str, Any]

    def parser(self) -> AnswerParser:
        """A parser for one answer."""
        return AnswerParser(self.form, self.names, thinks=self.thinks, begun=self.begun)


def options_of(fields: Fields) -> dict[str, Any]:
    """The template's inputs besides messages and tools. Raises: ApiError."""
    options: dict[str, Any] = {}
    variables = fields.inner("chat_template_kwargs")
    if variables is not None:
        options["template_variables"] = dict(variables.values)
    if fields.flag("continue_final_message"):
        if fields.values.get("add_generation_prompt"):
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        options["continue_final_message"] = True
    return options


def render(lease: Lease, prompt: ChatPrompt) -> tuple[list[int], Reading]:
    """Token ids of a prompt. Raises: PromptError, TemplateError."""
    tools = None if prompt.structured else prompt.tools
    form = find_format(lease.template)
    messages, options = prompt.messages, _with_effort(prompt, lease.template)
    if not form.in_template:
        messages = without_template_calls(messages, tools, form)
    else:
        messages = as_template_takes_them(lease, messages)
        if tools is not None:
            options["tools"] = [tool.definition for tool in tools.declared]
    ids = lease.engine.encode(messages=messages, **options)
    thinks, begun = _THINK in lease.template, opens_thought(lease.engine.tokenizer, ids)
    special = lease.engine.tokenizer.special_id
    marks = [*([_THINK] if thinks else []), *([form.begin] if tools is not None else [])]
    settings: dict[str, Any] = {"special_tokens": True} if any(special(mark) is not None for mark in marks) else {}
    if tools is None:
        return ids, Reading(None, frozenset(), thinks, begun, settings)
    thinking: Thinking = "begun" if begun else "may" if thinks else "no"
    settings["lark"] = call_grammar(tools, form, special, thinking)
    names = frozenset(tool.name for tool in tools.callable)
    return ids, Reading(form, names, thinks, begun, settings)


def _with_effort(prompt: ChatPrompt, template: str) -> dict[str, Any]:
    variables = dict(prompt.options.get("template_variables", {}))
    if prompt.effort is not None and "reasoning_effort" in template:
        variables.setdefault("reasoning_effort", prompt.effort)
    if prompt.effort == "none" and "enable_thinking" in template:
        variables.setdefault("enable_thinking", False)
    return {**prompt.options, **({"template_variables": variables} if variables else {})}


def opens_thought(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a prompt ends inside a thought, because the template opened one."""
    tail = list(ids[-_TAIL:])
    for index in range(len(tail) - 1, -1, -1):
        if tokenizer.token(tail[index]) == _THINK:
            return not tokenizer.decode(tail[index + 1 :]).strip()
    return tokenizer.decode(ids[-2 * _TAIL :]).rstrip().endswith(_THINK)
