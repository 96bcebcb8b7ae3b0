"""Conversations on disk: one JSON file each, replaced atomically.

A crash during an answer loses at most the text since the last save.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

UNTITLED = "New conversation"
_TITLE_LENGTH = 40


@dataclass
class Conversation:
    """messages: in edgelm's form; unfinished: the last answer is missing or incomplete, after a stop or a crash."""

    name: str
    title: str = UNTITLED
    messages: list[dict[str, str]] = field(default_factory=list)
    unfinished: bool = False

    def ask(self, text: str) -> None:
        """Add a message of the user. The first one becomes the title."""
        if not self.messages:
            self.title = " ".join(text.split())[:_TITLE_LENGTH] or UNTITLED
        self.messages.append({"role": "user", "content": text})
        self.unfinished = True

    def hear(self, text: str) -> None:
        """Add a piece of the answer."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        self.messages[-1]["content"] += text


class Store:
    """A folder of conversations."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def new(self) -> Conversation:
        """A new conversation. It is not written before `save`."""
        return Conversation(f"{time.time_ns():x}")

    def all(self) -> list[Conversation]:
        """All conversations, latest first. Files that cannot be read are ignored."""
        files = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        return [found for file in files if (found := _read(file)) is not None]

    def save(self, conversation: Conversation) -> None:
        """Write a conversation. Atomic: an existing file is replaced only by a complete one."""
        file = self._folder / f"{conversation.name}.json"
        scratch = file.with_suffix(".tmp")
        with open(scratch, "w", encoding="utf-8", opener=_private) as stream:
            json.dump(asdict(conversation), stream, ensure_ascii=False, indent=1)
        scratch.replace(file)

    def delete(self, conversation: Conversation) -> None:
        """Remove a conversation's file, if any."""
        (self._folder / f"{conversation.name}.json").unlink(missing_ok=True)


def data_folder() -> Path:
    """The program's folder for the user's data."""
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", Path.home() / "AppData" / "Roaming")) / "edgelm-desktop"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edgelm-desktop"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edgelm-desktop"


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _read(file: Path) -> Conversation | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in found["messages"]]
        return Conversation(file.stem, str(found["title"]), messages, bool(found["unfinished"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
