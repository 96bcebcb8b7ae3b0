"""From a caller's prompt to token ids: plain text, messages through the chat template, or ids."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..bundle import folder as bundle_files
from ..bundle.folder import Bundle
from ..errors import BundleCorruptError, ContextLengthError, PromptError, TemplateError, shown
from .control_tokens import ControlTokens
from .messages import plain_messages
from .options import NO_OPTIONS, ChatOptions
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .messages import Message
    from .templates import Templates


class PromptEncoder:
    """A bundle's tokenizer and chat template. Immutable, safe between threads."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        """Read and compile the templates. Raises: BundleCorruptError, TemplateError."""
        self._model = bundle.manifest.model
        self._tokenizer = tokenizer
        self.templates = _bundle_templates(bundle)
        self._control: dict[ChatTemplate, ControlTokens] = {}

    def encode(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        options: ChatOptions = NO_OPTIONS,
        fitting: bool = False,
    ) -> list[int]:
        """The prompt's token ids, at least one. Exactly one of the first three arguments is given. options: for
        messages. fitting: refuse a text that is clearly too long for the context before encoding it.

        Raises: PromptError, TemplateError, ContextLengthError.
        """
        given = [
            name
            for name, value in (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))
            if value is not None
        ]
        if len(given) != 1:
            raise PromptError(
                f"give exactly one of prompt, messages and token_ids, found {' and '.join(given) or 'none'}"
            )
        if messages is None and options.given:
            raise PromptError(f"{options.given[0]} belongs to messages: leave it out, or give messages")
        if prompt is not None:
            ids = self._of_text(prompt, fitting)
        elif messages is not None:
            ids = self._of_messages(plain_messages(messages), options, fitting)
        else:
            ids = self._checked_ids(token_ids if token_ids is not None else ())
        if not ids:
            raise PromptError(f"the {given[0]} is empty: give at least one token to continue from")
        if max(ids) >= self._model.vocab_size:
            raise PromptError(
                f"the {given[0]} holds {self._tokenizer.token(max(ids))!r}, a token for which the model has no row: "
                "leave it out"
            )
        return ids

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the templates read; empty without a template."""
        found = self.templates
        return frozenset().union(*(template.variables for template in found.all())) if found else frozenset()

    def check_length(self, token_ids: Sequence[int]) -> None:
        """Raises: ContextLengthError, if the prompt does not fit into the context."""
        context = self._model.context_length
        if len(token_ids) > context:
            raise ContextLengthError(
                f"the prompt has {len(token_ids):,} tokens, the model's context holds {context:,}: shorten it"
            )

    def _checked(self, text: str, fitting: bool) -> str:
        least, context = self._tokenizer.least_tokens(text) if fitting else 0, self._model.context_length
        if least > context:
            raise ContextLengthError(
                f"the prompt has {len(text):,} characters, so {least:,} tokens or more, the model's context holds "
                f"{context:,}: shorten it"
            )
        return text

    def _of_text(self, prompt: str, fitting: bool) -> list[int]:
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt must be a text, found {shown(prompt)}: token ids are given as token_ids")
        return self._tokenizer.encode(self._checked(prompt, fitting)) if prompt else []

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        vocab_size = self._model.vocab_size
        try:
            ids = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise PromptError(f"token_ids must be a sequence of whole numbers ({error})") from error
        for token in ids:
            if not 0 <= token < vocab_size:
                raise PromptError(f"token id {shown(token)} is out of range: the model has ids 0 to {vocab_size - 1}")
        return ids

    def _of_messages(self, messages: Sequence[dict[str, Any]], options: ChatOptions, fitting: bool) -> list[int]:
        if not messages:
            return []
        template = self._template(options)
        if options.tokens_in_messages:
            text = self._checked(template.prompt(messages, options), fitting)
            return self._tokenizer.encode(text, special=False)
        control = self._control_tokens(template)
        messages, options, marks = control.mark(messages, options)
        text = self._checked(template.prompt(messages, options), fitting)
        return self._tokenizer.encode(text, special=False) if marks is None else control.encode(text, marks)

    def render(self, messages: Sequence[Message], options: ChatOptions = NO_OPTIONS) -> str:
        """The text that the chat template makes of messages. Raises: PromptError, TemplateError."""
        return self._template(options).prompt(plain_messages(messages), options)

    def _template(self, options: ChatOptions) -> ChatTemplate:
        if self.templates is None:
            raise TemplateError("the bundle has no chat template, so it takes no messages: give a prompt instead")
        return self.templates.of(options)

    def _control_tokens(self, template: ChatTemplate) -> ControlTokens:
        """The template's control tokens, made for the first messages: plain prompts do not need them."""
        if template not in self._control:
            assert self.templates is not None
            self._control[template] = ControlTokens(self._tokenizer, template.texts, self.templates.control_tokens)
        return self._control[template]


def _bundle_templates(bundle: Bundle) -> Templates | None:
    text = bundle.read_text(bundle_files.TOKENIZER_CONFIG_NAME)
    name = bundle.path / bundle_files.TOKENIZER_CONFIG_NAME
    try:
        config = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(f"{name} is not valid JSON ({error}): export the bundle again") from error
    if not isinstance(config, dict):
        raise BundleCorruptError(f"{name} is not a JSON object: export the bundle again")
    template = bundle.read_text(bundle_files.CHAT_TEMPLATE_NAME)
    if not template and not config.get("chat_template"):
        return None
    from .templates import find_templates

    return find_templates(template, config)
