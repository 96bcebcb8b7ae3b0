"""Generation settings: every setting with its range and default, checked in one place.

Knows no model: `serving/requests.py` checks what depends on a vocabulary or a context.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from .errors import SettingsError, shown
from .setting_values import LARGEST, json_schema_text, real_number, stop_texts, token_biases, token_ids, whole_number

DEFAULT_MAX_TOKENS = 256
ContextPolicy = Literal["stop", "slide"]


class SettingsKeywords(TypedDict, total=False):
    """The settings as keywords of `Engine.generate` and its siblings; `GenerationSettings` says what each means."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    lark: str | None
    timeout: float | None
    context_full: ContextPolicy
    keep: int
    lookup: bool
    special_tokens: bool


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt. The defaults are greedy. Immutable and hashable; `docs/generation.md` has the formulas.

    max_tokens: the most tokens to generate. min_tokens: the answer may not end before so many.
    temperature: 0 takes the most likely token; above 0 tokens are drawn. top_k (0: off), top_p (1: off) and min_p
    (0: off) narrow the draw, and need a temperature. seed: None for a new one in each request. repetition_penalty (1:
    off) lowers tokens that prompt or answer contain; presence_penalty and frequency_penalty (0: off) are subtracted
    from tokens that the answer contains. logit_bias: added to the logits of these ids; -inf bans one. stop: texts that
    end the answer and are not part of it. stop_token_ids: the same for ids, besides the model's own. logprobs: None, or
    how many alternatives to report beside each chosen token.
    json_schema (object or JSON text), regex, lark (a grammar in llguidance's form of Lark): the answer follows it
    (extra "structured").
    timeout: seconds from the call, after which the answer ends as it is.
    context_full: "stop" ends the answer when the context is full; "slide" forgets the older half of what follows the
    first `keep` tokens, and goes on.
    lookup: use prompt-lookup decoding: draft tokens from repetitions in the text, verified in one step. Used only where
    answers stay the same, bit for bit.
    special_tokens: show special tokens in the answer's text, such as markers of tool calls, but not the end token.
    Raises: SettingsError.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    lark: str | None = None
    timeout: float | None = None
    context_full: ContextPolicy = "stop"
    keep: int = 0
    lookup: bool = True
    special_tokens: bool = False

    def __post_init__(self) -> None:
        for name in _WHOLE:
            self._normalize(name, _whole(name, getattr(self, name)))
        for name in _REAL:
            self._normalize(name, _real(name, getattr(self, name)))
        self._normalize("stop", stop_texts(self.stop))
        self._normalize("stop_token_ids", token_ids(self.stop_token_ids))
        self._normalize("logit_bias", token_biases(self.logit_bias))
        self._normalize("json_schema", json_schema_text(self.json_schema))
        for name in ("regex", "lark"):
            if not isinstance(getattr(self, name), str | None):
                raise SettingsError(f"{name} must be a text, found {shown(getattr(self, name))}")
        if self.context_full not in ("stop", "slide"):
            raise SettingsError(f'context_full must be "stop" or "slide", found {shown(self.context_full)}')
        for name in ("lookup", "special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name} must be True or False, found {shown(getattr(self, name))}")
        self._check_conflicts()

    @staticmethod
    def of(base: GenerationSettings | None, keywords: Mapping[str, Any]) -> GenerationSettings:
        """Settings from keywords, on top of a base or the defaults. Raises: SettingsError, also for unknown names."""
        known = [item.name for item in dataclasses.fields(GenerationSettings)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else "docs/generation.md lists them"
                raise SettingsError(f"there is no setting {shown(name)}: {hint}")
        if not isinstance(base, GenerationSettings | None):
            raise SettingsError(f"settings must be GenerationSettings, found {shown(base)}")
        return dataclasses.replace(base or _DEFAULTS, **keywords) if keywords else base or _DEFAULTS

    @property
    def deterministic(self) -> bool:
        """Whether the answer depends on no random draw."""
        return self.temperature == 0

    @property
    def cacheable(self) -> bool:
        """Whether the response cache may hold the answer: no random draw, and no log-probabilities."""
        return self.deterministic and self.logprobs is None

    @property
    def plain(self) -> bool:
        """Whether each token is simply the most likely one: no setting changes, constrains or reports the logits."""
        return self.deterministic and all(getattr(self, name) == getattr(_DEFAULTS, name) for name in _TOUCH_LOGITS)

    @property
    def structured(self) -> bool:
        """Whether a schema, a regular expression or a grammar constrains the answer."""
        return any(getattr(self, name) is not None for name in _STRUCTURES)

    def cache_key(self) -> dict[str, Any]:
        """Every setting that can change a finished answer, as JSON values: all except the timeout, the lookup, and the
        seed if nothing is drawn."""
        without = ("timeout", "lookup", "seed") if self.deterministic else ("timeout", "lookup")
        key = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in without}
        bias = [[token, str(value)] for token, value in self.logit_bias.items()]
        return {**key, "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids), "logit_bias": bias}

    def _normalize(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_conflicts(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise SettingsError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: lower the first")
        if self.deterministic:
            for name in _DRAWING:
                if getattr(self, name) != getattr(type(self), name):
                    raise SettingsError(f"{name} does nothing at temperature 0: give a temperature, such as 0.7, too")
        if self.keep and self.context_full != "slide":
            raise SettingsError('keep belongs to context_full="slide": give both')
        given = [name for name in _STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} were both given: an answer follows one of them")
        # A grammar may describe free text, which a stop text may end.
        if given and self.lark is None and (self.stop or self.stop_token_ids or self.min_tokens):
            raise SettingsError(
                "stop, stop_token_ids and min_tokens would end the answer elsewhere than json_schema or regex does: "
                "leave them out"
            )


# Minimum and maximum of each whole number.
_WHOLE: dict[str, tuple[int, int]] = {
    "max_tokens": (1, sys.maxsize),
    "min_tokens": (0, sys.maxsize),
    "top_k": (0, sys.maxsize),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, sys.maxsize),
    "keep": (0, sys.maxsize),
}
# The condition for each other number (NaN fulfils none), and its words in a message.
_REAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or a number above it"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: 1 / LARGEST <= x <= LARGEST, "above 0 (from 1e-6 to 1e6; 1 is off)"),
    "presence_penalty": (lambda x: abs(x) <= LARGEST, "a number from -1e6 to 1e6"),
    "frequency_penalty": (lambda x: abs(x) <= LARGEST, "a number from -1e6 to 1e6"),
    "timeout": (lambda x: 0 < x < math.inf, "a number of seconds above 0"),
}
_MAY_BE_NONE = ("seed", "logprobs", "timeout")
# They narrow the draw, so they have no effect on greedy answers.
_DRAWING = ("top_k", "top_p", "min_p")
_TOUCH_LOGITS = (
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "json_schema",
    "regex",
    "lark",
)
_STRUCTURES = ("json_schema", "regex", "lark")


def _whole(name: str, value: Any) -> int | None:
    if value is None and name in _MAY_BE_NONE:
        return None
    least, most = _WHOLE[name]
    number = whole_number(value)
    if number is None or not least <= number <= most:
        raise SettingsError(f"{name} must be a whole number of {least} or more, found {shown(value)}")
    return number


def _real(name: str, value: Any) -> float | None:
    if value is None and name in _MAY_BE_NONE:
        return None
    accepts, wanted = _REAL[name]
    number = real_number(value)
    if not accepts(number):
        raise SettingsError(f"{name} must be {wanted}, found {shown(value)}")
    return number


_DEFAULTS = GenerationSettings()
