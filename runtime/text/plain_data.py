"""Convert a template's inputs to JSON's types and nothing else, as transformers does.

The sandbox does not know which methods of richer objects (enums, arrays, pydantic models) are dangerous.
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
    """A copy in JSON's types (and tuples). Other values become the name of their type, such as "<ndarray>".

    Raises: PromptError for values that contain each other endlessly.
    """
    try:
        return _plain(value)
    except RecursionError as error:
        raise PromptError("the values hold each other without end, or too deeply: give plain objects") from error


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, base in _BASES:  # subclasses become their base type
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
