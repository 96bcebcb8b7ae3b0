"""Two answers to one prompt, cut where they begin to differ, for the terminal and for report.html. Standard library
only.

A model may write anything, so its text is made printable here: a terminal must not obey it, and a page must stay
well-formed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cut:
    """An answer in three parts: what both have in common, the first word that differs ("" at the end), and the rest."""

    same: str
    word: str
    rest: str


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers of the fp32 graph and of the quantized one."""

    prompt: str
    before: Cut
    after: Cut

    @property
    def equal(self) -> bool:
        """Whether both answers are the same from beginning to end."""
        return self.before == self.after


def examples(report: dict[str, Any]) -> list[Example]:
    """The examples of a report.json. Entries that are missing, or of another version of edgelm, are left out."""
    found = report.get("examples")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, (list, tuple)) else []
    texts = [[entry.get(key) for key in ("prompt", "fp32", "quantized")] for entry in entries]
    return [
        Example(printable(prompt), *cut(printable(before), printable(after)))
        for prompt, before, after in texts
        if isinstance(prompt, str) and isinstance(before, str) and isinstance(after, str)
    ]


def cut(before: str, after: str) -> tuple[Cut, Cut]:
    """Both texts, cut in front of the first word that differs."""
    if before == after:
        return Cut(before, "", ""), Cut(after, "", "")
    pairs = enumerate(zip(before, after, strict=False))
    differs = next((index for index, (left, right) in pairs if left != right), min(len(before), len(after)))
    start = differs
    if not all(text[differs : differs + 1].strip() == "" for text in (before, after)):
        while start and not before[start - 1].isspace():
            start -= 1
    return _from(before, start), _from(after, start)


def printable(text: str) -> str:
    """The text with line breaks kept and other unprintable characters escaped as Python does."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _from(text: str, start: int) -> Cut:
    word = re.compile(r"\s*\S*").match(text, start)
    end = word.end() if word is not None else start
    return Cut(text[:start], text[start:end], text[end:])
