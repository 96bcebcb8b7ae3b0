"""Chat templates: messages to prompt text, rendered by jinja2's sandbox exactly as transformers renders them.

Templates come from a model's authors, so they run in a sandbox: they cannot reach attributes that lead out of it, nor
change their inputs (`sandbox`). Import this module late: jinja2 takes 30 ms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.utils import Namespace

from ..errors import PromptError, TemplateError, shown
from .continuing import cut_at_mark, field_to_continue, mark_end
from .control_tokens import with_marks
from .messages import Message, has_parts, joined_parts, plain_messages, with_reasoning
from .options import NO_OPTIONS, OWN_VARIABLES, ChatOptions
from .sandbox import BoundedSandbox, budget

__all__ = ["ChatTemplate", "Message"]

_PROBE = "edgelm-probe"
# Errors besides jinja2's own that a template can raise when it is compiled (which folds constants) or rendered.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,  # of jinja2's own filters
    RuntimeError,  # endless recursion, an object of jinja2 that cannot be printed
    SyntaxError,
    MemoryError,
)


class _GenerationBlocks(Extension):
    """{% generation %} marks the assistant's text for training; here it only prints its body."""

    tags = {"generation"}  # noqa: RUF012, so declared by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """jinja2's namespace without underscored names, as transformers restricts it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the underscored name {name!r}")
        super().__setitem__(name, value)


class _PlainDict:
    """The template's `dict`, without access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class ChatTemplate:
    """One compiled template. Safe between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """source: jinja2 text; special_tokens: variables such as bos_token and eos_token.

        Raises: TemplateError, if the template cannot be parsed.
        """
        # As in transformers' `_compile_jinja_template` (utils/chat_template_utils.py): templates rely on it.
        environment = BoundedSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.globals["namespace"] = _PlainNamespace
        environment.globals["dict"] = _PlainDict()
        environment.filters["tojson"] = _to_json
        environment.bound_filters()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._source = source
        self._environment = environment
        self._globals = frozenset(environment.globals)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(environment.bounded(source))
        except _FAILURES as error:
            raise TemplateError(
                f"the bundle's chat template cannot be parsed ({error}): give a plain prompt"
            ) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and does not set itself."""
        return frozenset(find_undeclared_variables(self._tree()))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The texts that the template may write: its own text, and the string constants in its expressions."""
        tree = self._tree()
        constants = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        return (*(node.data for node in tree.find_all(nodes.TemplateData)), *constants)

    def prompt(self, messages: Sequence[Message], options: ChatOptions = NO_OPTIONS) -> str:
        """`render`, with checks that the template loses nothing. Lists of text parts are joined if the template takes
        no lists.

        Raises: PromptError for parts that are not text, and for variables that the template does not read;
        TemplateError, also if the template leaves out a system message, tools or documents.
        """
        self._check_variables(options)
        known = plain_messages(messages)
        if has_parts(known):
            texts = joined_parts(known)
            known = [_one_part(*pair) for pair in zip(known, texts, strict=True)] if self._takes_parts else texts
        text = self.render(known, options)
        for index, message in enumerate(known):
            # If the template shows the message, another text in its place gives another prompt.
            content = message.get("content")
            if message.get("role") != "system" or not _says_something(content):
                continue
            other = {**message, "content": _altered(content)}
            if text == self.render([*known[:index], other, *known[index + 1 :]], options):
                raise TemplateError(
                    "the model's chat template leaves this system message out: put the instruction into the first "
                    "user message"
                )
        without = {"tools": replace(options, tools=None), "documents": replace(options, documents=None)}
        for name, fewer in without.items():
            if getattr(options, name) and text == self.render(known, fewer):
                raise TemplateError(
                    f"the model's chat template leaves {name} out: describe them in a message, or leave them out"
                )
        return text

    def _check_variables(self, options: ChatOptions) -> None:
        for name in options.template_variables:
            if name not in self.variables:
                known = sorted(self.variables - {*OWN_VARIABLES, *self._special_tokens, *self._globals})
                raise PromptError(
                    f"the model's chat template reads no variable {shown(name)}: "
                    + (f"it reads {', '.join(known)}" if known else "it reads none")
                )

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template takes contents that are lists: it then shows a part's text, not the repr of the list."""
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        except TemplateError:
            return False
        return _PROBE in text and not re.search(rf"""["']{_PROBE}["']""", text)

    def render(
        self, messages: Sequence[Message], options: ChatOptions = NO_OPTIONS, *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation, up to where the assistant's answer begins or continues.

        Raises: PromptError for invalid messages, and for a last message that cannot be continued; TemplateError with
        the template's own message, if it refuses these messages.
        """
        known = with_reasoning(plain_messages(messages))
        field = field_to_continue(options)
        if field is None:
            return self._rendered(known, options, add_generation_prompt)
        final = mark_end(known, field, self._source)
        return cut_at_mark(self._rendered(known, options, False), final)

    def _rendered(self, messages: Sequence[Message], options: ChatOptions, add_generation_prompt: bool) -> str:
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": options.tools,
            "documents": options.documents,
            **self._special_tokens,
            **options.template_variables,
            **budget(),
        }
        try:
            return str(self._template.render(variables))
        except _FAILURES as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from error

    def _tree(self) -> nodes.Template:
        return self._environment.parse(self._source)


def _says_something(content: Any) -> bool:
    return bool(content.strip()) if isinstance(content, str) else isinstance(content, list | tuple) and len(content) > 0


def _altered(content: Any) -> Any:
    """A changed content of the same form, a text or a list of one part."""
    if isinstance(content, str):
        return f"{content} (altered)"
    return [{**part, "text": f"{part['text']} (altered)"} for part in content]


def _one_part(message: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """A system message with its parts joined into one, because some templates show only the first."""
    if message.get("role") != "system" or not isinstance(message.get("content"), list | tuple):
        return message
    return {**message, "content": [{"type": "text", "text": text["content"]}]}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which is wrong in prompts.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return with_marks(text) if ensure_ascii else text


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(template: str) -> str:
    return datetime.now().strftime(template)
