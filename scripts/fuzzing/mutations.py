"""Random changes to data and texts of kinds that have broken programs before."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 2**64,
    10**400, "", "0", "\x00", "\x1b[2J", "\ud800", "\u202e", "a" * 3000, "../x", "C:\\x", [], {}, [[]], {"": None},
    [None], "None", "{{ x }}", "\ufeff",
)  # fmt: skip
WORDS = (
    "Once",
    " ",
    "\n",
    "\u00e4",
    "\U0001f600",
    "\x00",
    "\ud83d",
    "<|im_end|>",
    "{%",
    "%}",
    "{{",
    "}}",
    "'",
    '"',
    "\\",
)


def odd(source: random.Random) -> Any:
    """A value of any type."""
    return copy.deepcopy(source.choice(ODD))


def text(source: random.Random, most: int = 30) -> str:
    """A text of odd pieces."""
    return "".join(source.choice(WORDS) for _ in range(source.randrange(most)))


def changed(value: Any, source: random.Random, times: int = 3) -> Any:
    """A copy of plain data with a few places replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(source.randint(1, times)):
        value = _changed_once(value, source)
    return value


def _changed_once(value: Any, source: random.Random) -> Any:
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(list(value))
        kind = source.random()
        if kind < 0.1:
            value.pop(key)
        elif kind < 0.2:
            value[text(source, 4)] = odd(source)
        else:
            value[key] = _changed_once(value[key], source)
        return value
    if isinstance(value, list) and value and source.random() < 0.9:
        index = source.randrange(len(value))
        kind = source.random()
        if kind < 0.1:
            value.pop(index)
        elif kind < 0.2:
            value.append(copy.deepcopy(value[index]))
        else:
            value[index] = _changed_once(value[index], source)
        return value
    if isinstance(value, str) and source.random() < 0.5:
        return damaged(value.encode("utf-8", "surrogatepass"), source).decode("utf-8", "replace")
    return odd(source)


def damaged(data: bytes, source: random.Random) -> bytes:
    """Bytes with some changed, removed, doubled or inserted."""
    found = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(found) + 1)
        kind = source.randrange(5)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            del found[place : place + source.randrange(1, 40)]
        elif kind == 2:
            found[place:place] = source.randbytes(source.randrange(1, 20))
        elif kind == 3:
            found[place:place] = found[max(0, place - 40) : place]
        else:
            del found[place:]
    return bytes(found)


def as_json(value: Any, source: random.Random) -> str:
    """JSON of plain data, occasionally broken or with endless brackets."""
    kind = source.random()
    if kind < 0.03:
        return "[" * 100_000
    encoded = json.dumps(value)
    if kind < 0.2:
        return damaged(encoded.encode(), source).decode("utf-8", "replace")
    return encoded
