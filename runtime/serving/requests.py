"""Make a `Request` from a caller's arguments: check them, encode the prompt, compile the grammar; and its key in the
response cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..bundle.cuts import may_cut
from ..bundle.folder import Bundle
from ..caches.responses.cache import response_key
from ..decoding.grammar import GrammarCompiler
from ..decoding.sampling import check_token_ids
from ..errors import SettingsError, shown
from ..host.patience import within
from ..settings import GenerationSettings, SettingsKeywords
from ..text.options import ChatKeywords, ChatOptions
from ..text.prompts import PromptEncoder
from ..text.tokenizer import Tokenizer
from .answer import Request
from .batches import Prompt, check_batch, kind_of, naming, settings_of_each

if TYPE_CHECKING:
    from ..text.messages import Message


class RequestKeywords(SettingsKeywords, ChatKeywords, total=False):
    """The keywords of `Engine.generate` and its siblings: settings of the answer, and options for messages."""


class RequestMaker:
    """Makes the requests of one bundle. Safe between threads."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, numerics: str) -> None:
        """numerics: of the machine (`sessions.numerics`), for cache keys. Raises: BundleCorruptError, TemplateError."""
        self.prompts = PromptEncoder(bundle, tokenizer)
        self._tokenizer = tokenizer
        self._may_cut = may_cut(bundle)
        self._manifest = bundle.manifest
        self._digest = bundle.manifest.digest
        self._grammars = GrammarCompiler(bundle)
        self._numerics = numerics

    def one(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        base: GenerationSettings | None,
        keywords: Mapping[str, Any],
    ) -> Request:
        """Make one request; its time runs from now. Raises: PromptError, ContextLengthError, SettingsError,
        TemplateError, MissingExtraError."""
        started = time.perf_counter()
        options, keywords = ChatOptions.split(keywords)
        settings = self._with_stop_ids(GenerationSettings.of(base, keywords))
        if settings.lookup and not self._may_cut:
            settings = replace(settings, lookup=False)
        model = self._manifest.model
        check_token_ids(settings, model.vocab_size)
        if settings.keep >= model.context_length:
            raise SettingsError(f"keep must be less than the context of {model.context_length:,} tokens")
        left = None if settings.timeout is None else started + settings.timeout - time.perf_counter()
        ids = within(left, lambda: self.prompts.encode(prompt, messages, token_ids, options, fitting=True))
        if ids is None:  # the deadline has passed, so nothing will be computed
            return Request([], settings, started)
        self.prompts.check_length(ids)
        return Request(ids, settings, started, self._grammars.compile(settings))

    def batch(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings] | None,
        max_rows: int,
        keywords: Mapping[str, Any],
    ) -> list[Request]:
        """A request for each prompt. Raises: as `one`, naming the prompt by its index."""
        check_batch(prompts, max_rows)
        own, others = ChatOptions.split(keywords)
        options = {name: getattr(own, name) for name in own.given}
        each = settings_of_each(len(prompts), settings, others)
        requests = []
        for index, prompt in enumerate(prompts):
            with naming(index):
                requests.append(self.one(*kind_of(prompt), each[index], options))
        return requests

    def encode(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        keywords: Mapping[str, Any],
    ) -> list[int]:
        """The token ids of a prompt. Raises: PromptError, TemplateError, SettingsError for unknown keywords."""
        return self.prompts.encode(prompt, messages, token_ids, _chat_options(keywords, "encode"))

    def render(self, messages: Sequence[Message], keywords: Mapping[str, Any]) -> str:
        """The text of messages. Raises: PromptError, TemplateError, SettingsError for unknown keywords."""
        return self.prompts.render(messages, _chat_options(keywords, "render"))

    def _with_stop_ids(self, settings: GenerationSettings) -> GenerationSettings:
        """Add the token id of each stop text that is exactly one special token, since such a token may have no text.

        Raises: SettingsError for a stop text that can never occur, because it contains a special token.
        """
        special = {text: self._tokenizer.special_id(text) for text in settings.stop}
        vocab_size = self._manifest.model.vocab_size
        ids = [token for token in special.values() if token is not None and token < vocab_size]
        for text in [] if settings.special_tokens else settings.stop:
            part = self._tokenizer.special_part(text)
            if part is not None and part != text:
                raise SettingsError(
                    f"the stop text {shown(text)} holds {part!r}, a special token, which answers show with "
                    "special_tokens=True only: give that too, or the token alone"
                )
        return replace(settings, stop_token_ids=(*settings.stop_token_ids, *ids)) if ids else settings

    def key(self, request: Request) -> str:
        """The key in the response cache. It covers everything that can change the answer, including the manifest."""
        settings = {
            **request.settings.cache_key(),
            "end_ids": sorted(self._manifest.tokens.eos),
            "context_length": self._manifest.model.context_length,
            "numerics": self._numerics,
        }
        return response_key(self._digest, request.token_ids, settings)


def _chat_options(keywords: Mapping[str, Any], method: str) -> ChatOptions:
    options, others = ChatOptions.split(keywords)
    for name in others:
        raise SettingsError(f"{method} takes no {shown(name)}: leave it out")
    return options
