"""Drives the desktop example as a user would, in a process of its own. tests/test_desktop.py runs it.

python desktop_driver.py SCENARIO BUNDLES DATA [SCREENSHOT] prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tkinter as tk
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "desktop"))

from conversations import Store
from models import Models
from window import Window
from worker import Worker

from edgelm.runtime import GenerationSettings
from edgelm.runtime.sessions.rows import OrtRows

PATIENCE_S = 60.0
STEP_S, TOKEN_S = 0.01, 0.0005


class User:
    """A simulated user of the window."""

    def __init__(self, bundles: Path, data: Path, max_tokens: int, dark: bool = False) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.root = tk.Tk()
        self.bars: list[float] = []
        models = Models([bundles], data)
        self.window = Window(
            self.root, Worker(GenerationSettings(max_tokens=max_tokens)), Store(data / "c"), models, dark
        )
        self.window.open_model(next(iter(models.by_name)))
        self.wait(lambda: self.window._ready)

    def wait(self, until: Callable[[], bool]) -> None:
        """Process the window's events until the condition holds."""
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < end, f"timed out: {self.status} {self.text!r}"
            self.root.update()
            self.bars.append(float(self.window._bar["value"]))
            time.sleep(0.001)

    def write(self, text: str) -> None:
        """Type and press Enter."""
        self.root.update()
        self.window._input.focus_force()
        self.window._input.insert("1.0", text)
        self.window._input.event_generate("<Return>")
        self.root.update()

    def kept(self) -> list[Path]:
        """The files of saved conversations."""
        return list(self.window._store._folder.glob("*.json"))

    def is_done(self) -> bool:
        return self.window._answers is None

    @property
    def text(self) -> str:
        return self.window._transcript._text.get("1.0", "end-1c")

    @property
    def status(self) -> str:
        return str(self.window._status["text"])

    def take_picture(self, path: Path) -> None:
        from PIL import ImageGrab

        for _ in range(20):
            self.root.update()
            time.sleep(0.01)
        left, top = self.root.winfo_rootx(), self.root.winfo_rooty()
        box = (left, top, left + self.root.winfo_width(), top + self.root.winfo_height())
        ImageGrab.grab(box, xdisplay=os.environ["DISPLAY"]).save(path)

    def said(self) -> dict[str, Any]:
        window = self.window
        return {
            "text": self.text,
            "status": self.status,
            "memory": str(window._memory["text"]),
            "button": str(window._button["text"]),
            "can_continue": str(window._continue["state"]) == "normal",
            "titles": [window._list.item(item, "text") for item in window._list.get_children()],
        }


def talk(user: User) -> dict[str, Any]:
    user.write("Once upon a time\nthere was")
    user.wait(user.is_done)
    first = user.said()
    user.window.new()
    user.write("Another one")
    user.wait(user.is_done)
    return {"first": first, "second": user.said()}


def stop(user: User) -> dict[str, Any]:
    user.write("Once upon a time")
    user.wait(lambda: len(user.text) > 40)
    while_answering = user.said()
    user.window._button.invoke()
    user.wait(user.is_done)
    stopped = user.said()
    user.window._continue.invoke()
    length = len(user.text)
    user.wait(lambda: len(user.text) > length + 5)
    user.window._button.invoke()
    user.wait(user.is_done)
    return {"while_answering": while_answering, "stopped": stopped, "continued": user.said()}


def killed(user: User) -> dict[str, Any]:
    user.write("Once upon a time, in a land far away, there was a king who had a dog.")
    user.wait(user.is_done)
    user.write("And then?")
    user.wait(lambda: any(path.read_text().count("assistant") > 1 for path in user.kept()))
    print(json.dumps(user.said()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def again(user: User) -> dict[str, Any]:
    restarted = user.said()
    user.window._continue.invoke()
    user.wait(user.is_done)
    return {"restarted": restarted, "continued": user.said()}


def long_prompt(user: User) -> dict[str, Any]:
    user.write("A long text of many words. " * 16)
    user.wait(lambda: len(user.bars) > 0 and user.bars[-1] >= 1.0)
    user.window._button.invoke()
    user.wait(user.is_done)
    return {"bars": user.bars, **user.said()}


SCENARIOS = {"talk": (talk, 24), "stop": (stop, 10_000), "killed": (killed, 80), "again": (again, 24)}


def slow_down() -> None:
    """Make each step of the tiny model as slow as one of a real model."""
    feed = OrtRows.feed

    def slowly(self: OrtRows, row: int, token_ids: Sequence[int], *more: Any) -> Any:
        time.sleep(STEP_S + TOKEN_S * len(token_ids))
        return feed(self, row, token_ids, *more)

    OrtRows.feed = slowly  # type: ignore[method-assign]


def main() -> None:
    slow_down()
    name, bundles, data, *pictures = sys.argv[1:]
    act, tokens = {**SCENARIOS, "long_prompt": (long_prompt, 400)}[name]
    user = User(Path(bundles), Path(data), tokens, dark=name == "again")
    found = act(user)
    for picture in pictures:
        user.take_picture(Path(picture))
    user.window.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
