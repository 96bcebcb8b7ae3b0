"""Chat templates: messages to prompt text, rendered by jinja2's sandbox exactly as transformers renders them.

Templates are data from a model's authors, so they run where they can reach no attribute that leads out of the sandbox
and change nothing that they are given. jinja2 is imported at the first use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from .errors import TemplateError

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template. Safe between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """source: jinja2 text; special_tokens: what the template may name, such as bos_token and eos_token.

        Raises: TemplateError, if the template cannot be parsed.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As in transformers' `_compile_jinja_template` (utils/chat_template_utils.py): templates rely on it.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the bundle's chat template cannot be parsed ({error}): give a plain prompt"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, up to where the assistant's answer begins.

        Raises: TemplateError with the template's own words, if it refuses these messages.
        """
        import jinja2

        try:
            return str(
                self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special_tokens,
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from error


def find_template(template_file: str | None, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a bundle: chat_template.jinja, else the entry of tokenizer_config.json, else None.

    A list of named templates gives the one named "default". Raises: TemplateError.
    """
    source = template_file or tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not source:
        return None
    special = {key: _content(value) for key, value in tokenizer_config.items() if key.endswith("_token") and value}
    return ChatTemplate(source, special)


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, Mapping) else value)


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
    import jinja2

    raise jinja2.TemplateError(message)


def _now(template: str) -> str:
    return datetime.now().strftime(template)
