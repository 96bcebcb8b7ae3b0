"""The desktop example, used on a virtual screen: answers, stopping, a kill and a restart."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, missing
from .served import with_template

DRIVER = Path(__file__).parent / "desktop_driver.py"
PATIENCE_S = 180


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    """The name of a display."""
    program = shutil.which("Xvfb")
    if program is None or importlib.util.find_spec("_tkinter") is None:
        missing("needs Xvfb and tkinter")
    read, write = os.pipe()
    command = [program, "-displayfd", str(write), "-screen", "0", "1280x800x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL) as server:
        os.close(write)
        assert select.select([read], [], [], 20)[0], "Xvfb did not start"
        yield ":" + os.read(read, 20).decode().strip()
        server.terminate()
    os.close(read)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with_template(tiny_bundle, folder / "tiny")
    return folder


def shown(text: str) -> str:
    """The text as the window shows it: random weights write any character."""
    return text.replace("\0", "\ufffd")


class Desk:
    """Runs scenarios of `desktop_driver.py` on the same conversations and caches."""

    def __init__(self, screen: str, bundles: Path, data: Path) -> None:
        self._screen, self._bundles, self.data = screen, bundles, data

    def run(self, scenario: str, *, killed: bool = False) -> Any:
        command = [sys.executable, DRIVER, scenario, self._bundles, self.data, *([] if killed else [self.picture])]
        environment = {**os.environ, "DISPLAY": self._screen}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
        return json.loads(done.stdout)

    @property
    def picture(self) -> Path:
        return self.data.parent / "window.png"

    def conversations(self) -> list[Any]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((self.data / "c").glob("*.json"))]


@pytest.fixture
def desk(screen: str, bundles: Path, tmp_path: Path) -> Desk:
    return Desk(screen, bundles, tmp_path / "data")


def test_messages_are_answered_and_conversations_kept(desk: Desk) -> None:
    found = desk.run("talk")
    first, second = desk.conversations()
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert first["messages"][0]["content"] == "Once upon a time\nthere was" and first["messages"][1]["content"]
    assert shown(first["messages"][1]["content"]) in found["first"]["text"]
    assert shown(second["messages"][1]["content"]) in found["second"]["text"]
    assert found["second"]["titles"] == ["Another one", "Once upon a time there was"]
    assert "tokens read" in found["first"]["status"] and "MB of memory" in found["first"]["memory"]
    assert found["first"]["button"] == "Send"
    assert desk.picture.stat().st_size > 10_000


def test_an_answer_is_stopped_and_continued(desk: Desk) -> None:
    found = desk.run("stop")
    assert found["while_answering"]["button"] == "Stop" and not found["while_answering"]["can_continue"]
    assert found["stopped"]["button"] == "Send" and found["stopped"]["can_continue"]
    assert "stopped" in found["stopped"]["text"]
    (kept,) = desk.conversations()
    assert len(kept["messages"]) == 2, "continuing extends the same answer"
    assert kept["unfinished"] and shown(kept["messages"][1]["content"]) in found["continued"]["text"]


def test_a_killed_program_goes_on_where_it_was(desk: Desk) -> None:
    desk.run("killed", killed=True)
    (before,) = desk.conversations()
    assert before["unfinished"] and before["messages"][3]["content"]
    found = desk.run("again")
    assert shown(before["messages"][3]["content"]) in found["restarted"]["text"]
    assert "interrupted" in found["restarted"]["text"] and found["restarted"]["can_continue"]
    (after,) = desk.conversations()
    assert after["messages"][3]["content"].startswith(before["messages"][3]["content"])
    # Unless the very next token ended the answer.
    assert len(after["messages"][3]["content"]) > len(before["messages"][3]["content"]) or not after["unfinished"]
    # The prefixes of the turn before the kill are on the disk.
    assert "cached)" in found["continued"]["status"]


def test_a_long_prompt_shows_how_much_is_read(desk: Desk) -> None:
    found = desk.run("long_prompt")
    bars = sorted(set(found["bars"]))
    assert bars[0] == 0 and bars[-1] == 1 and len(bars) > 2


# ---- saved files, without a window


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the example's modules, and forget them afterwards because their names are generic."""
    folder = ROOT / "examples" / "desktop"
    monkeypatch.syspath_prepend(str(folder))
    yield
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.usefixtures("example")
def test_damaged_conversations_are_left_out_and_left_alone(tmp_path: Path) -> None:
    from conversations import Store

    store = Store(tmp_path)
    conversation = store.new()
    conversation.ask("Who\nare you?")
    conversation.hear("I am")
    conversation.hear(" a model.")
    store.save(conversation)
    (tmp_path / "broken.json").write_text('{"title": 1')
    (found,) = store.all()
    assert found == conversation and found.title == "Who are you?" and found.unfinished
    assert [message["content"] for message in found.messages] == ["Who\nare you?", "I am a model."]
    if os.name == "posix":
        assert (tmp_path / f"{conversation.name}.json").stat().st_mode & 0o77 == 0
    store.delete(found)
    assert store.all() == [] and (tmp_path / "broken.json").exists()


@pytest.mark.usefixtures("example")
def test_models_that_were_opened_are_remembered(tiny_bundle: Path, tmp_path: Path) -> None:
    from models import Models

    inner, data = tmp_path / "models", tmp_path / "data"
    data.mkdir()
    shutil.copytree(tiny_bundle, inner / "one")
    models = Models([], data)
    assert models.by_name == {} and models.add(tmp_path) == []
    assert models.add(inner) == ["one"] and models.add(inner / "one") == []
    assert Models([], data).by_name == {"one": inner / "one"}
    (data / "chosen.json").write_text("[1")
    assert Models([inner / "one"], data).by_name == {"one": inner / "one"}
