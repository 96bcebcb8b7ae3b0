"""What templates are given: objects of JSON's types and nothing else, as transformers rebuilds them.

Methods of richer objects (enums, arrays, models of pydantic) are beyond what the sandbox knows as dangerous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import PromptError

_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def plain(value: Any) -> Any:
    """A copy of JSON's types (and tuples). What has no such form becomes the name of its type, such as "<ndarray>".

    Raises: PromptError for values that hold each other without end.
    """
    try:
        return _plain(value)
    except RecursionError as error:
        raise PromptError("the values hold each other without end, or too deeply: give plain objects") from error


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, base in _BASES:  # subclasses lose what they add
        if isinstance(value, kind):
            return base(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _of_object(value)


def _of_object(value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"
