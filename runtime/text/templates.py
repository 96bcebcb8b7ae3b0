"""The chat templates of a bundle: one, or several with names, one of them for requests with tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TemplateError
from .chat import ChatTemplate
from .options import ChatOptions

_DEFAULT, _WITH_TOOLS = _NAMES = ("default", "tool_use")
# The special tokens that templates get as variables, as in transformers.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Templates:
    """A bundle's templates. control_tokens: those that tokenizer_config.json lists, None if it has no list."""

    default: ChatTemplate
    with_tools: ChatTemplate | None
    control_tokens: frozenset[str] | None

    def all(self) -> list[ChatTemplate]:
        """Every template."""
        return [template for template in (self.default, self.with_tools) if template is not None]

    def of(self, options: ChatOptions) -> ChatTemplate:
        """The template for a request."""
        return self.with_tools if self.with_tools is not None and options.tools is not None else self.default


def find_templates(template_file: str | None, tokenizer_config: Mapping[str, Any]) -> Templates | None:
    """chat_template.jinja, else the entry of tokenizer_config.json, else None.

    From a list of named templates, "default" is used, and "tool_use" for requests with tools. Raises: TemplateError.
    """
    sources = _named(template_file or tokenizer_config.get("chat_template"))
    if _DEFAULT not in sources:
        return None
    special = {key: _content(tokenizer_config.get(key)) for key in _SPECIAL}
    known = {key: text for key, text in special.items() if text}
    with_tools = ChatTemplate(sources[_WITH_TOOLS], known) if _WITH_TOOLS in sources else None
    listed = tokenizer_config.get("chat_control_tokens")
    control = frozenset(item for item in listed if isinstance(item, str)) if isinstance(listed, list) else None
    return Templates(ChatTemplate(sources[_DEFAULT], known), with_tools, control)


def _named(source: Any) -> dict[str, str]:
    """The sources by their names."""
    if source is None or source in ("", []):
        return {}
    if not isinstance(source, list):
        return {_DEFAULT: _text(source)}
    entries = [entry for entry in source if isinstance(entry, Mapping)]
    return {name: _text(entry.get("template")) for entry in entries if (name := entry.get("name")) in _NAMES}


def _text(source: Any) -> str:
    if not isinstance(source, str):
        raise TemplateError(f"the bundle's chat template is not text but {source!r:.40}: give a plain prompt")
    return source


def _content(value: Any) -> str | None:
    """The text of a special token, given as a text or as an object; None for anything else."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None
