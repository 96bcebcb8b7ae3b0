"""The terminal of `edgelm chat`: lines that break between words, no echo while an answer is printed, line editing.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TAB = 8


class Wrapping:
    """Breaks lines of text that comes in pieces between words, where a terminal would break within a word.

    A word is held back until it is whole. Characters that take two places, as in Chinese, are words of their own.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        """columns: returns the present width, since a window may change."""
        self._columns = columns
        self._column = 0
        self._word = ""

    def add(self, text: str) -> str:
        """Add a piece. Returns what may be printed now."""
        return "".join(map(self._character, text))

    def finish(self) -> str:
        """The last word."""
        return self._placed()

    def _character(self, character: str) -> str:
        if character == "\n":
            return self._placed() + self._line_end(character)
        if character.isspace():
            return self._placed() + self._blank(character)
        if _places(character) == 2:
            word = self._placed()
            self._word = character
            return word + self._placed()
        self._word += character
        # A word longer than a line is broken anywhere.
        return self._placed() if self._length() >= self._columns() else ""

    def _length(self) -> int:
        return sum(map(_places, self._word))

    def _placed(self) -> str:
        """The word, on a new line where this one has no room for it."""
        word, length, columns = self._word, self._length(), max(1, self._columns())
        self._word = ""
        if self._column and self._column + length > columns:
            self._column = length
            return "\n" + word
        self._column += length
        return word

    def _blank(self, character: str) -> str:
        width = _TAB - self._column % _TAB if character == "\t" else 1
        if self._column + width > self._columns():
            return self._line_end("\n")
        self._column += width
        return character

    def _line_end(self, character: str) -> str:
        self._column = 0
        return character


def _places(character: str) -> int:
    """How many columns a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Terminal:
    """The terminal of this process, or pipes in its place."""

    def __init__(self) -> None:
        self.is_there = sys.stdin.isatty()
        # This module gives `input` editing and history. Not every system has it.
        self._readline: Any = _module("readline") if self.is_there else None
        self._wraps = self.is_there and sys.stdout.isatty()

    @property
    def edits(self) -> bool:
        """Whether a line can be edited."""
        return self._readline is not None

    def ask(self, prompt: str) -> str:
        """A line that is typed, or comes from the pipe. Raises: EOFError, KeyboardInterrupt."""
        return input(prompt if self.is_there else "")

    def edit(self, prompt: str, text: str) -> str:
        """A line to edit that begins with this text."""
        self._readline.set_startup_hook(lambda: self._readline.insert_text(text))
        try:
            return input(prompt) or text
        finally:
            self._readline.set_startup_hook()

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        """Yields a function that prints a piece of an answer. What is typed meanwhile appears at the next prompt, not
        in the answer."""
        wrapping = Wrapping(lambda: shutil.get_terminal_size().columns) if self._wraps else None
        with _no_echo(self.is_there):
            try:
                yield lambda text: _print(text if wrapping is None else wrapping.add(text))
            finally:
                if wrapping is not None:
                    _print(wrapping.finish())


def note(text: str, end: str = "\n") -> None:
    """Print something that is not part of an answer, to standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


def _print(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _no_echo(is_terminal: bool) -> Iterator[None]:
    """Do not echo what is typed; it waits for the next prompt. Ctrl-C still interrupts."""
    termios = _module("termios") if is_terminal else None
    if termios is None:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
