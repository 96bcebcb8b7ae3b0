"""How much a chat template may compute: steps, characters, seconds; and what an operation would make, before it does.

Names are those of jinja2's filters and of methods of Python's str.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError

# A conversation of 10,000 messages, gone through five times, takes 50,000 steps.
MOST_STEPS = 500_000
# Of all texts and lists that are made in one rendering; a prompt of a million tokens has four million.
MOST_CHARACTERS = 1 << 28
# Of one text, and of the items of one list.
LONGEST = 1 << 24
MOST_SECONDS = 20.0
# Of numbers that say how long something becomes.
_LARGEST_WIDTH = 1_000_000

_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "truncate")
_WRITING = ("string", "e", "escape", "forceescape", "pprint", "tojson", "xmlattr", "urlize", "striptags", "title")
_WIDTH = re.compile(r"\d{7,}|\*")
_NESTED_WIDTH = re.compile(r"\{[^{}]*:[^{}]*\{")


class Budget:
    """What is left for one rendering. Each method raises SecurityError where that is too little."""

    def __init__(self) -> None:
        self._steps, self._characters = MOST_STEPS, MOST_CHARACTERS
        self._end = time.monotonic() + MOST_SECONDS

    def step(self, static: int = 0) -> None:
        """A turn of a loop or a call, in which the template itself writes so many characters."""
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"the template loops for more than {MOST_STEPS:,} turns")
        if time.monotonic() > self._end:
            raise SecurityError(f"the template computes for more than {MOST_SECONDS:.0f} seconds")
        self.make(static)

    def make(self, characters: int) -> None:
        """A text, or a list, of so many characters or items."""
        self._characters -= characters
        if characters > LONGEST or self._characters < 0:
            raise SecurityError("the template makes too long a text")


def size(value: Any) -> int:
    """Characters of a text, items of a list, 0 for what is neither."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def written(value: Any) -> int:
    """About how many characters a value has as text; counting ends above `LONGEST`."""
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
    """Refuse what a filter or a method of a text would make of a value, where it is too much."""
    given = list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)
    check = _CHECKS.get(name)
    if check is not None:
        budget.make(check(value, given))


def check_percent(text: Any, values: Any, budget: Budget) -> None:
    """Refuse `text % values` where widths or values are too large."""
    if isinstance(text, str):
        budget.make(_formatted(text, [values]))


def _padded(value: Any, given: list[Any]) -> int:
    widths = [number for number in given if isinstance(number, int)]
    if any(abs(width) > _LARGEST_WIDTH for width in widths):
        raise SecurityError("the template asks for too wide a text")
    texts = [len(text) for text in given if isinstance(text, str)]
    # A line may be one character, and each gets what is put in front of it or between.
    lines = value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else 1
    return written(value) + lines * max([0, *map(abs, widths)]) + (written(value) * max(texts, default=0))


def _replaced(value: Any, given: list[Any]) -> int:
    if not isinstance(value, str) or len(given) < 2 or not all(isinstance(text, str) for text in given[:2]):
        return written(value)
    return len(value) + value.count(given[0]) * len(given[1])


def _joined(value: Any, given: list[Any]) -> int:
    """As a filter the list comes first, as a method the text between its items."""
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
