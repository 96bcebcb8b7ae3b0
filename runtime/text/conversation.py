"""A conversation with a model: its messages, undo, saving to a file. Knows no terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..host.files import read_text


class Conversation:
    """An optional system message and turns of user and assistant. Not safe between threads.

    left_out: number of the oldest messages, without the system message, that are no longer sent to the model.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.left_out = 0
        self._turns: list[dict[str, str]] = []

    def __len__(self) -> int:
        """Number of messages, the system message not counted."""
        return len(self._turns)

    def copy(self) -> Conversation:
        """Another conversation with the same messages."""
        other = Conversation(self.system)
        other._turns = list(self._turns)
        other.left_out = self.left_out
        return other

    def messages(self) -> list[dict[str, str]]:
        """The messages for the chat template."""
        return self._from(self.left_out)

    def everything(self) -> list[dict[str, str]]:
        """All messages, including those that are left out."""
        return self._from(0)

    def leave_out(self, fits: Callable[[list[dict[str, str]]], bool]) -> None:
        """Leave out the oldest turns until the rest fits. A turn is a user's message with everything up to the next
        one. The last turn and the system message always stay."""
        starts = [index for index, turn in enumerate(self._turns) if turn["role"] == "user" and index > self.left_out]
        for start in starts:
            if fits(self.messages()):
                return
            self.left_out = start

    @property
    def is_answered(self) -> bool:
        """Whether the last message is the model's."""
        return bool(self._turns) and self._turns[-1]["role"] == "assistant"

    def _from(self, first: int) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(dict(turn) for turn in self._turns[first:])]

    def ask(self, text: str) -> None:
        """Add a user's message."""
        self._turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the model's answer, or continue its last one."""
        if self.is_answered:
            text = self._turns.pop()["content"] + text
        self._turns.append({"role": "assistant", "content": text})

    def undo(self) -> str:
        """Take back the last user's message and what follows it; returns the message. Raises: PromptError."""
        for index in range(len(self._turns) - 1, -1, -1):
            if self._turns[index]["role"] == "user":
                text = self._turns[index]["content"]
                del self._turns[index:]
                self.left_out = 0  # more messages may fit now
                return text
        raise PromptError("the conversation is empty: there is nothing to take back")

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns.clear()
        self.left_out = 0

    def save(self, path: Path) -> None:
        """Write a new file, readable by its owner only: a JSON list of messages, as `Engine.generate` takes them.
        Raises: PromptError."""
        # A model may write half of a surrogate pair, which JSON can escape and UTF-8 cannot hold.
        text = json.dumps(self.everything(), ensure_ascii=False, indent=1) + "\n"
        data = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text).encode("utf-8")
        try:
            with open(path, "xb", opener=_private) as file:
                file.write(data)
        except FileExistsError as error:
            raise PromptError(f"{path} exists already: give another name, or delete it first") from error
        except OSError as error:
            raise PromptError(f"{path} cannot be written ({error.strerror}): give another name") from error

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one. Raises: PromptError, which leaves this one unchanged."""
        try:
            found = json.loads(read_text(path))
        except OSError as error:
            raise PromptError(f"{path} cannot be read ({error.strerror}): give another name") from error
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path} is not a saved conversation ({error}): give another name") from error
        messages = _checked(found, path)
        first = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = first[0]["content"] if first else None
        self._turns = messages[len(first) :]
        self.left_out = 0


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _checked(found: Any, path: Path) -> list[dict[str, str]]:
    if not isinstance(found, list) or not all(_is_message(message) for message in found):
        raise PromptError(f"{path} is not a saved conversation: it must hold a list of messages with role and content")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
