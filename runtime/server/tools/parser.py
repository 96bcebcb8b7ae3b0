"""Parse an answer as it comes into thoughts, content and calls. Text that may belong to a marker is held back."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .formats import CallFormat

_THINK, _THINK_END = "<think>", "</think>"
_BLANKS = " \n\r\t"
# The beginning of a call without a marker, which is the whole answer.
BARE_CALL = '{"n'
# The name of a call in front of its arguments.
_NAME = re.compile(r"([\w.-]+)(?:\[ARGS\])?")


@dataclass(frozen=True)
class Words:
    """A piece of text, of the answer or of the thought before it."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True)
class Call:
    """A whole call. arguments: the text of a JSON object."""

    id: str
    name: str
    arguments: str


Part = Words | Call


class AnswerParser:
    """Reads one answer. Use it once.

    Text that looks like a call but is none (truncated JSON, an undeclared name) stays in the content, so that nothing
    is lost.
    """

    def __init__(
        self, form: CallFormat | None, names: frozenset[str] = frozenset(), *, thinks: bool = False, begun: bool = False
    ) -> None:
        """form: None if there are no calls; thinks: the answer may begin with a thought; begun: the prompt already
        opened one."""
        self._form = form
        self._names = names
        self._held = ""
        self._state: Literal["start", "reasoning", "content", "call"] = (
            "reasoning" if begun else "start" if thinks else "content"
        )
        self._shown = False
        self._strip = thinks or begun

    def add(self, text: str) -> list[Part]:
        """Add a piece of text. Returns the parts that it completes."""
        self._held += text
        return list(self._advance(False))

    def finish(self) -> list[Part]:
        """The parts that were held back, at the end of the answer."""
        return list(self._advance(True))

    def _advance(self, last: bool) -> Iterator[Part]:
        before = None
        while before != (self._state, self._held):
            before = self._state, self._held
            step = {"start": self._start, "reasoning": self._reasoning, "content": self._content, "call": self._call}
            yield from step[self._state](last)

    def _start(self, last: bool) -> Iterator[Part]:
        text = self._held.lstrip(_BLANKS)
        if text.startswith(_THINK):
            self._state, self._held = "reasoning", text.removeprefix(_THINK)
        elif last or not _THINK.startswith(text):
            self._state = "content"
            self._strip = False
        yield from ()

    def _reasoning(self, last: bool) -> Iterator[Part]:
        thought, found, rest = self._held.partition(_THINK_END)
        if found:
            self._state, self._held = "content", rest
            thought = thought.rstrip(_BLANKS)
            yield from _words("reasoning", thought if self._shown else thought.lstrip(_BLANKS))
            self._shown = False
            return
        keep = 0 if last else _overlap(self._held, _THINK_END)
        # Blanks are held back: those in front of the end mark are not part of the thought.
        shown = self._held[: len(self._held) - keep].rstrip(_BLANKS)
        if not self._shown:
            self._held = self._held.lstrip(_BLANKS)
            shown = shown.lstrip(_BLANKS)
        self._shown = self._shown or bool(shown)
        self._held = "" if last else self._held[len(shown) :]
        yield from _words("reasoning", shown)

    def _content(self, last: bool) -> Iterator[Part]:
        if self._strip and not self._shown:
            # A semicolon separates calls that have no marker.
            self._held = self._held.lstrip(_BLANKS + (";" if self._form is not None and self._form.optional else ""))
        form = self._form
        if form is None:
            yield from self._show(len(self._held))
            return
        place = self._held.find(form.begin)
        if place < 0 and form.optional and not self._shown:
            text = self._held.lstrip(_BLANKS)
            if text.startswith(BARE_CALL):
                place = 0
            elif BARE_CALL.startswith(text) and not last:
                return
        if place >= 0:
            yield from self._show(len(self._held[:place].rstrip(_BLANKS)))
            self._state = "call"
            return
        end = len(self._held) - (0 if last else _overlap(self._held, form.begin))
        # Blanks in front of a call are not content.
        yield from self._show(end if last else len(self._held[:end].rstrip(_BLANKS)))

    def _call(self, last: bool) -> Iterator[Part]:
        assert self._form is not None, "there are calls only where there is a format"
        found = read_calls(self._held, self._form, last)
        if found is None:
            return
        calls, length = found
        self._state = "content"
        if not calls or any(name not in self._names for name, _ in calls):
            yield from self._show(length)
            return
        for name, arguments in calls:
            yield Call(f"call_{secrets.token_hex(12)}", name, arguments)
        self._held = self._held[length:]
        self._strip, self._shown = True, False

    def _show(self, count: int) -> Iterator[Part]:
        text, self._held = self._held[:count], self._held[count:]
        self._shown = self._shown or bool(text)
        yield from _words("content", text)


def read_calls(text: str, form: CallFormat, last: bool) -> tuple[list[tuple[str, str]], int] | None:
    """Names and arguments of the calls at the beginning of a text, possibly none, and the length of the text read; None
    if more text is needed. last: no more text comes."""
    place = _skip(text, 0)
    place = _skip(text, place + len(form.begin)) if text.startswith(form.begin, place) else place
    name = ""
    if form.layout == "named":
        found = _NAME.match(text, place)
        name, place = (found[1], _skip(text, found.end())) if found else ("", place)
    try:
        value, place = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        end = text.find(form.end, place) + len(form.end) if form.end else 0
        return ([], len(text)) if last else ([], end) if end > len(form.end) else None
    behind = _skip(text, place)
    if form.end and text.startswith(form.end, behind):
        place = behind + len(form.end)
    elif form.end and form.end.startswith(text[behind:]) and not last:
        return None
    items = [{"name": name, form.key: value}] if name else value if isinstance(value, list) else [value]
    calls = [_call_of(item, form.key) for item in items]
    return ([call for call in calls if call is not None] if None not in calls else []), place


def _call_of(item: Any, key: str) -> tuple[str, str] | None:
    name, arguments = (item.get("name"), item.get(key)) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _skip(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip(_BLANKS))


def _overlap(text: str, mark: str) -> int:
    """The length of the longest suffix of the text that is a prefix of the mark."""
    return next(
        (length for length in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-length:])), 0
    )


def _words(kind: Literal["content", "reasoning"], text: str) -> Iterator[Part]:
    if text:
        yield Words(kind, text)
