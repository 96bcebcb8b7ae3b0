"""The reasons of a profile: each key's value, and the comment in front of it in the file.

A comment is the reason for all keys below it, up to the next comment, table or blank line. A comment in front of a
table is the reason for its keys without their own comment. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .profile import EXTENDS, load_target, profile_path

_TABLE = re.compile(r"^\[([\w-]+)\]")
_KEY = re.compile(r"^([\w-]+)\s*=")


@dataclass(frozen=True)
class Setting:
    """One key of a profile, dotted if it is in a table. reason: "" if the file has none; origin: the name of the
    profile whose file sets it: the profile itself or the one that it extends."""

    key: str
    value: Any
    reason: str
    origin: str


def settings_of(name: str) -> list[Setting]:
    """Every setting of a profile, in the order of the file. name: as `load_target`. Raises: TargetError."""
    profile = load_target(name)
    path = profile_path(name)
    text = path.read_text(encoding="utf-8")
    own = _reasons(text)
    base = re.search(rf"^{EXTENDS}\s*=\s*[\"'](.+?)[\"']", text, re.MULTILINE)
    inherited = {setting.key: setting for setting in settings_of(base.group(1))} if base else {}
    found = []
    for key, value in _flat({"description": profile.description, **profile.settings()}):
        if key in own or key not in inherited:
            found.append(Setting(key, value, own.get(key, ""), profile.name))
        else:
            found.append(inherited[key])
    return found


def _flat(data: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for key, value in data.items():
        inner = _flat(value) if isinstance(value, dict) else None
        pairs += [(f"{key}.{name}", item) for name, item in inner] if inner is not None else [(key, value)]
    return pairs


def _reasons(text: str) -> dict[str, str]:
    """Dotted key -> the comment in front of it, on one line."""
    found: dict[str, str] = {}
    comment: list[str] = []
    table, of_table = "", ""
    before = ""
    for line in text.splitlines():
        if line.startswith("#"):
            comment = [*(comment if before.startswith("#") else []), line[1:].strip()]
        elif header := _TABLE.match(line):
            table, of_table = f"{header.group(1)}.", " ".join(comment) if before.startswith("#") else ""
            comment = []
        elif key := _KEY.match(line):
            found[table + key.group(1)] = " ".join(comment) or of_table
        else:
            comment = []
        before = line
    return found
