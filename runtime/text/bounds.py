"""Limits for chat templates: steps, characters, seconds. The size of an operation's result is checked before it runs.

Names are those of jinja2's filters and of methods of Python's str.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError

# Five loops over a conversation of 10,000 messages take 50,000 steps.
MOST_STEPS = 500_000
# Total size of the texts and lists made in one rendering; a prompt of a million tokens has four million characters.
MOST_CHARACTERS = 1 << 28
# Size of one text, or number of items of one list.
LONGEST = 1 << 24
MOST_SECONDS = 20.0
# Limit for numbers that set the length of something.
_LARGEST_WIDTH = 1_000_000

_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "truncate")
_WRITING = ("string", "e", "escape", "forceescape", "pprint", "xmlattr", "urlize", "striptags", "title")
_WIDTH = re.compile(r"\d{7,}|\*")
_NESTED_WIDTH = re.compile(r"\{[^{}]*:[^{}]*\{")


class Budget:
    """The remaining budget of one rendering. Each method raises SecurityError if it is exceeded."""

    def __init__(self) -> None:
        self._steps, self._characters = MOST_STEPS, MOST_CHARACTERS
        self._end = time.monotonic() + MOST_SECONDS

    def step(self, static: int = 0) -> None:
        """Count an iteration of a loop, or a call. static: characters that the template itself writes in it."""
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"the template loops for more than {MOST_STEPS:,} turns")
        if time.monotonic() > self._end:
            raise SecurityError(f"the template computes for more than {MOST_SECONDS:.0f} seconds")
        self.make(static)

    def make(self, characters: int) -> None:
        """Count a text of so many characters, or a list of so many items."""
        self._characters -= characters
        if characters > LONGEST or self._characters < 0:
            raise SecurityError("the template makes too long a text")


def size(value: Any) -> int:
    """Characters of a text, items of a list, 0 for what is neither."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def written(value: Any) -> int:
    """The approximate length of a value written as text. Counting stops above `LONGEST`."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Mapping | list | tuple):
        return 8
    items: Iterable[Any] = [*value, *value.values()] if isinstance(value, Mapping) else value
    total = 2
    for item in items:
        total += written(item) + 2
        if total > LONGEST:
            break
    return total


def check_call(name: str, value: Any, arguments: Mapping[str, Any] | tuple[Any, ...], budget: Budget) -> None:
    """Refuse a call of a filter or a text's method whose result would be too large."""
    given = list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)
    check = _CHECKS.get(name)
    if check is not None:
        budget.make(check(value, given))


def check_percent(text: Any, values: Any, budget: Budget) -> None:
    """Refuse `text % values` if widths or values are too large."""
    if isinstance(text, str):
        budget.make(_formatted(text, [values]))


def _padded(value: Any, given: list[Any]) -> int:
    widths = [number for number in given if isinstance(number, int)]
    if any(abs(width) > _LARGEST_WIDTH for width in widths):
        raise SecurityError("the template asks for too wide a text")
    texts = [len(text) for text in given if isinstance(text, str)]
    # Each line may be a single character, and each gets the inserted text.
    lines = value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else 1
    return written(value) + lines * max([0, *map(abs, widths)]) + (written(value) * max(texts, default=0))


def _replaced(value: Any, given: list[Any]) -> int:
    if not isinstance(value, str) or len(given) < 2 or not all(isinstance(text, str) for text in given[:2]):
        return written(value)
    return len(value) + value.count(given[0]) * len(given[1])


def _joined(value: Any, given: list[Any]) -> int:
    """The size of a join. As a filter the list comes first, as a method the separator does."""
    items, between = (given[0] if given else (), value) if isinstance(value, str) and given else (value, "")
    between = next((text for text in given if isinstance(text, str)), between)
    return written(items) + size(items) * size(between)


def _formatted(text: Any, given: list[Any]) -> int:
    if isinstance(text, str) and (_WIDTH.search(text) or _NESTED_WIDTH.search(text)):
        raise SecurityError("the template formats with too large, or computed, a width")
    fields = text.count("%") + text.count("{") + 1 if isinstance(text, str) else 1
    return written(text) + fields * written(given)


def _serialized(value: Any, given: list[Any]) -> int:
    indents = [size(indent) if isinstance(indent, str) else indent for indent in given if isinstance(indent, int | str)]
    return written(value) * (1 + max([0, *indents]))


_CHECKS: dict[str, Callable[[Any, list[Any]], int]] = {
    **dict.fromkeys(_PADDING, _padded),
    **dict.fromkeys(_WRITING, lambda value, _: written(value)),
    "replace": _replaced,
    "join": _joined,
    "format": _formatted,
    "format_map": _formatted,
    "tojson": _serialized,
}
