"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (extra "structured").

llguidance reads tokenizer.json itself and needs neither torch nor transformers. It is imported when the first request
asks for it. Preparing a vocabulary costs some 0.3 s for 50,000 tokens, once an engine.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.folder import TOKENIZER_NAME, Bundle
from ..errors import MissingExtraError, SettingsError
from ..host.files import MODEL_TEXT_BYTES, read_text
from ..host.forks import watch_forks
from ..settings import GenerationSettings

if TYPE_CHECKING:
    import llguidance


# The settings that hold a grammar; llguidance calls them the same.
_FORMS = ("json_schema", "regex", "lark")
# The key of a schema with llguidance's options, and the default for whitespace: one blank, or a line end with
# indentation.
_GUIDANCE, _BLANKS = "x-guidance", r"([ ]?|\n[ \t]{0,12})"
# llguidance 1.9.1 overflows its stack, which ends the process, for integers from -2^63 to about -9.22 * 10^18.
_LEAST_INTEGER = -9 * 10**18
_LONG_INTEGER = re.compile(r"-\d{19,4000}")


class GrammarCompiler:
    """Makes grammars for one bundle's vocabulary. Safe between threads."""

    def __init__(self, bundle: Bundle) -> None:
        """Cheap: the vocabulary is prepared when the first grammar is asked for."""
        self._path = Path(bundle.path / TOKENIZER_NAME)
        self._vocab_size = bundle.manifest.model.vocab_size
        self._end_ids = bundle.manifest.tokens.eos
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        watch_forks(self)

    def after_fork(self) -> None:
        """Make a new lock in a child: a thread of the parent may have held the old one."""
        self._lock = threading.Lock()

    def compile(self, settings: GenerationSettings) -> MatcherGrammar | None:
        """The grammar of one answer, or None where the settings ask for none.

        Raises: SettingsError for a schema or an expression that is malformed, not supported or cannot be met, in
        llguidance's words; MissingExtraError.
        """
        if not settings.structured:
            return None
        guidance = _load()
        name = next(name for name in _FORMS if getattr(settings, name) is not None)
        try:
            source = getattr(guidance.LLMatcher, f"grammar_from_{name}")(_bounded(settings, name))
        except ValueError as error:
            raise SettingsError(f"{name} cannot be used: {error}") from error
        limits = guidance.LLParserLimits(verbose_errors=False)
        matcher = guidance.LLMatcher(self._prepared(guidance), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise SettingsError(f"{name} cannot be used: {_message(matcher)}")
        grammar = MatcherGrammar(matcher, self._vocab_size)
        if not grammar.finished and not grammar.allowed().any():
            raise SettingsError(f"{name} cannot be met: no token of this model begins such a text")
        return grammar

    def _prepared(self, guidance: Any) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                # The file's text, not its path: llguidance looks up on the network what is not a file.
                text = read_text(self._path, MODEL_TEXT_BYTES)
                try:
                    # Sized by the tokenizer: the model's vocabulary may be larger, or lack an added token.
                    self._vocabulary = guidance.LLTokenizer(text, None, list(self._end_ids) or None)
                except ValueError as error:
                    raise SettingsError(f"llguidance cannot read the bundle's tokenizer: {error}") from error
            return self._vocabulary


class MatcherGrammar:
    """The state of one answer in its grammar (`sampling.Grammar`). Not safe between threads."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size) bool; the end tokens are allowed where the answer may end.

        Raises: SettingsError, if nothing can follow what is there.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little").astype(bool)
        return np.pad(allowed, (0, self._vocab_size - len(allowed)))

    def accept(self, token: int) -> None:
        """Advance by a token. Raises: SettingsError, if the grammar cannot continue."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SettingsError(f"json_schema, regex or lark cannot be met from here on: {_message(self._matcher)}")


def few_blanks(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with limited whitespace between its parts, unless it sets its own. JSON allows any amount, and a model
    that may not write its own words might write blanks until `max_tokens`."""
    own = schema.get(_GUIDANCE, {})
    if not isinstance(own, Mapping) or own.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        return dict(schema)
    return {**schema, _GUIDANCE: {**own, "whitespace_pattern": _BLANKS}}


def _bounded(settings: GenerationSettings, name: str) -> str:
    value: str = getattr(settings, name)
    if name == "lark":  # which may hold schemas: %json {...}
        _require_safe(int(number) for number in _LONG_INTEGER.findall(value))
    if name != "json_schema":
        return value
    schema = json.loads(value)
    _require_safe(_integers(schema))
    return json.dumps(few_blanks(schema))


def _integers(schema: Any) -> Iterator[int]:
    """All integers of a schema, in no order."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | dict):
            left += value.values() if isinstance(value, dict) else value


def _require_safe(numbers: Iterable[int]) -> None:
    for number in numbers:
        if number < _LEAST_INTEGER:
            raise SettingsError(f"a schema holds an integer below {_LEAST_INTEGER}: use {_LEAST_INTEGER} or more")


def _message(matcher: llguidance.LLMatcher) -> str:
    return " ".join(matcher.get_error().split())


def _load() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise MissingExtraError("an answer that follows a schema or a regular expression", "structured") from error
