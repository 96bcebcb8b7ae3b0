"""Check and convert the values of generation settings: each function takes a user's value and returns the stored one.

Functions that do not know the setting's name return None, or NaN, for an invalid value; the others raise SettingsError.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

from .errors import SettingsError, shown

# Bound of the values that are added to logits or multiplied with them, so that nothing overflows float32.
LARGEST = 1e6


def whole_number(value: Any) -> int | None:
    """A whole number of any integer type; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def token_id(value: Any) -> int | None:
    """A token id that some model may have; None for anything else."""
    token = whole_number(value)
    return token if token is not None and 0 <= token <= sys.maxsize else None


def real_number(value: Any) -> float:
    """A number as float; NaN for anything else, and for numbers that no float can hold."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def stop_texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise SettingsError(f"stop must be a text or a list of texts, found {shown(value)}")
    if "" in texts:
        raise SettingsError("a stop text is empty, which would end every answer at once: leave it out")
    return tuple(dict.fromkeys(texts))


def token_ids(value: Any) -> tuple[int, ...]:
    ids = [token_id(token) for token in value] if isinstance(value, Iterable) else [None]
    found = sorted({token for token in ids if token is not None})
    if None in ids:
        raise SettingsError(f"stop_token_ids must be a list of token ids, found {shown(value)}")
    return tuple(found)


class FrozenBias(dict[int, float]):
    """A dict that cannot be changed, so that it can be hashed. Still a dict for json and `dataclasses.asdict`."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the logit_bias of settings cannot be changed: make new settings with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def token_biases(value: Any) -> FrozenBias:
    if not isinstance(value, Mapping):
        raise SettingsError(f"logit_bias must map token ids to numbers, found {shown(value)}")
    bias = {token_id(token): real_number(amount) for token, amount in value.items()}
    for token, amount in bias.items():
        if token is None:
            raise SettingsError(f"logit_bias must map token ids to numbers, found the keys {shown(list(value))}")
        if not (abs(amount) <= LARGEST or amount == -math.inf):
            raise SettingsError(f"logit_bias of token {token} must be from -1e6 to 1e6, or -inf to ban it")
    return FrozenBias({token: bias[token] for token in sorted(token for token in bias if token is not None)})


def json_schema_text(value: Any) -> str | None:
    """The schema as JSON text. The order of its keys is kept: properties are written in this order."""
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise SettingsError(f"json_schema must be an object, found {shown(schema)}")
        return json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"json_schema is not JSON ({error})") from error
