"""Chat templates: messages to prompt text, rendered by jinja2's sandbox exactly as transformers renders them.

Templates are data from a model's authors, so they run where they can reach no attribute that leads out of the sandbox
and change nothing that they are given (`sandbox`). Import this module late: jinja2 costs a start-up 30 ms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from ..errors import TemplateError
from .messages import Message, has_parts, joined_parts, template_messages
from .sandbox import BoundedSandbox, budget

__all__ = ["ChatTemplate", "Message", "find_template"]

_PROBE = "edgelm-probe"
# What a template can raise besides jinja2's own errors, when it is compiled (constants are folded then) or rendered.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,  # of jinja2's own filters
    RuntimeError,  # a recursion, an object of jinja2's that cannot be printed
    SyntaxError,
    MemoryError,
)


class _GenerationBlocks(Extension):
    """{% generation %} marks the assistant's words for training; here it prints its body."""

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


class ChatTemplate:
    """One compiled template. Safe between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """source: jinja2 text; special_tokens: what the template may name, such as bos_token and eos_token.

        Raises: TemplateError, if the template cannot be parsed.
        """
        # As in transformers' `_compile_jinja_template` (utils/chat_template_utils.py): templates rely on it.
        environment = BoundedSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.globals["namespace"] = _PlainNamespace
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(environment.bounded(source))
        except _FAILURES as error:
            raise TemplateError(
                f"the bundle's chat template cannot be parsed ({error}): give a plain prompt"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """`render`, where no system message is lost, and contents that are lists of text parts are texts for a template
        that takes no lists.

        Raises: PromptError for parts that are no texts; TemplateError, also for a template that leaves a system message
        out.
        """
        known = [dict(message) for message in messages]
        if has_parts(known):
            texts = joined_parts(known)
            known = [_one_part(*pair) for pair in zip(known, texts, strict=True)] if self._takes_parts else texts
        text = self.render(known)
        for index, message in enumerate(known):
            # With another text in its place, a template that shows it gives another prompt.
            content = message.get("content")
            if message.get("role") != "system" or not _says_something(content):
                continue
            other = {**message, "content": _altered(content)}
            if text == self.render([*known[:index], other, *known[index + 1 :]]):
                raise TemplateError(
                    "the model's chat template leaves this system message out: put the instruction into the first "
                    "user message"
                )
        return text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows the text of a part, and not how Python or JSON writes the part."""
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        except TemplateError:
            return False
        return _PROBE in text and not re.search(rf"""["']{_PROBE}["']""", text)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, up to where the assistant's answer begins.

        Raises: TemplateError with the template's own words, if it refuses these messages.
        """
        try:
            return str(
                self._template.render(
                    messages=template_messages(messages),
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special_tokens,
                    **budget(),
                )
            )
        except _FAILURES as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from error


def _says_something(content: Any) -> bool:
    return bool(content.strip()) if isinstance(content, str) else isinstance(content, list | tuple) and len(content) > 0


def _altered(content: Any) -> Any:
    """Another content in the place of one, a text or a list of one part."""
    if isinstance(content, str):
        return f"{content} (altered)"
    return [{**part, "text": f"{part['text']} (altered)"} for part in content]


def _one_part(message: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """A system message whose parts are one part, because some templates show the first one alone."""
    if message.get("role") != "system" or not isinstance(message.get("content"), list | tuple):
        return message
    return {**message, "content": [{"type": "text", "text": text["content"]}]}


def find_template(template_file: str | None, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a bundle: chat_template.jinja, else the entry of tokenizer_config.json, else None.

    A list of named templates gives the one named "default". Raises: TemplateError.
    """
    source = template_file or tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = (entry for entry in source if isinstance(entry, Mapping) and entry.get("name") == "default")
        source = next((entry.get("template", 0) for entry in named), None)
    if source is None or source in ("", []):
        return None
    if not isinstance(source, str):
        raise TemplateError(f"the bundle's chat template is not text but {source!r:.40}: give a plain prompt")
    special = {key: _content(value) for key, value in tokenizer_config.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: text for key, text in special.items() if text})


def _content(value: Any) -> str | None:
    """The text of a special token, written plain or as an object; None for what is no token (add_bos_token)."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which templates for models do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(template: str) -> str:
    return datetime.now().strftime(template)
