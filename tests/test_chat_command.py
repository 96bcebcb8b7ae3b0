"""`edgelm chat`: its conversation, its commands read from a pipe, and a session in a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import load
from edgelm.runtime.bundle.folder import file_digest
from edgelm.runtime.cli import main
from edgelm.runtime.commands.terminal import Wrapping
from edgelm.runtime.errors import PromptError
from edgelm.runtime.text.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
# Random weights seldom give text; a high temperature gives some each time.
SETTINGS = ["--max-tokens", "12", "--temperature", "5", "--seed", "3"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def chat_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    template = folder / "chat_template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][template.name] = {"bytes": template.stat().st_size, "sha256": file_digest(template)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def answer(bundle: Path, messages: list[dict[str, str]], **changes: Any) -> str:
    with load(bundle) as engine:
        return engine.generate(messages=messages, **{"max_tokens": 12, "temperature": 5.0, "seed": 3, **changes}).text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- the conversation


def test_a_conversation_keeps_its_messages_in_order() -> None:
    conversation = Conversation("be kind")
    conversation.ask("one")
    conversation.answer("1")
    conversation.ask("two")
    system = {"role": "system", "content": "be kind"}
    assert conversation.messages() == [system, user("one"), assistant("1"), user("two")]
    other = conversation.copy()
    assert conversation.undo() == "two"
    assert conversation.undo() == "one"
    with pytest.raises(PromptError, match="nothing to take back"):
        conversation.undo()
    assert conversation.messages() == [system] and len(other) == 3
    other.reset()
    assert other.messages() == [system]


@pytest.mark.parametrize("system", [None, "be kind"])
def test_a_saved_conversation_is_loaded_again_and_never_overwritten(tmp_path: Path, system: str | None) -> None:
    path, conversation = tmp_path / "talk.json", Conversation(system)
    conversation.ask("héllo 😀")
    conversation.answer("1\n2")
    conversation.save(path)
    loaded = Conversation("other")
    loaded.ask("gone")
    loaded.load(path)
    assert loaded.messages() == conversation.messages()
    assert loaded.system == system
    with pytest.raises(PromptError, match="exists already"):
        Conversation().save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == conversation.messages()


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "a"}]', "[" * 9_999]
)
def test_loading_an_invalid_file_changes_nothing(tmp_path: Path, content: str) -> None:
    path, conversation = tmp_path / "talk.json", Conversation("s")
    path.write_text(content, encoding="utf-8")
    conversation.ask("a")
    with pytest.raises(PromptError, match=r"talk\.json"):
        conversation.load(path)
    with pytest.raises(PromptError, match="absent"):
        conversation.load(tmp_path / "absent")
    with pytest.raises(PromptError):
        conversation.save(tmp_path / "no folder" / "file")
    assert len(conversation) == 1 and conversation.system == "s"


# ---- the command, from a pipe


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, bundle: Path, *lines: str, options: list[str] | None = None
) -> tuple[str, str]:
    """Standard output and standard error after these lines."""
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    capsys.readouterr()
    assert main(["chat", str(bundle), *(SETTINGS if options is None else options)]) == 0
    out, err = capsys.readouterr()
    return out, err


def test_answers_know_what_was_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    first = answer(chat_bundle, [user("hello")])
    second = answer(chat_bundle, [user("hello"), assistant(first), user("and?")])
    assert first and second and first != second
    out, err = chat(monkeypatch, capsys, chat_bundle, "hello", "", "and?")
    assert out == f"{first}\n{second}\n"
    assert err == "\n[length]" * 2


def test_the_system_message_is_part_of_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    expected = answer(chat_bundle, [{"role": "system", "content": "be kind"}, user("hello")])
    options = [*SETTINGS, "--system", "be kind"]
    assert chat(monkeypatch, capsys, chat_bundle, "hello", options=options)[0] == expected + "\n"
    plain = answer(chat_bundle, [user("hello")])
    lines = ("/system be kind", "hello", "/reset", "/system", "hello")
    assert chat(monkeypatch, capsys, chat_bundle, *lines)[0] == f"{expected}\n{plain}\n"


def test_undo_retry_and_edit_change_the_last_message(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    one, two = answer(chat_bundle, [user("one")]), answer(chat_bundle, [user("two")])
    out, err = chat(monkeypatch, capsys, chat_bundle, "one", "/undo", "two", "/edit one", "/retry", "/edit two")
    assert out.splitlines() == [line for text in (one, two, one, one, two) for line in text.splitlines()]
    assert "taken back: one" in err
    _, err = chat(monkeypatch, capsys, chat_bundle, "/undo", "/retry", "/edit x")
    assert err.count("nothing to take back") == 3


def test_settings_are_changed_and_invalid_ones_are_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    lines = ("/set seed 8", "/set temperature -1", "/set nonsense 4", "/set top_p", "/set stop zz", "hello", "/set")
    out, err = chat(monkeypatch, capsys, chat_bundle, *lines)
    assert out == answer(chat_bundle, [user("hello")], seed=8, stop="zz") + "\n"
    assert err.count("error: ") == 3
    assert "temperature must be" in err and "nonsense" in err and "top_p must be" in err
    assert "\n  seed = 8\n" in err and "\n  temperature = 5.0\n" in err and '\n  stop = ["zz"]\n' in err


def test_a_conversation_is_saved_and_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my talk.json"
    out, err = chat(monkeypatch, capsys, chat_bundle, "hello", f"/save {path}", f"/save {path}", "/save")
    first = out.removesuffix("\n")
    assert "saved 2 messages" in err and "exists already" in err and "name is missing" in err
    expected = answer(chat_bundle, [user("hello"), assistant(first), user("and?")]) + "\n"
    assert chat(monkeypatch, capsys, chat_bundle, f"/load {path}", "and?")[0] == expected
    assert chat(monkeypatch, capsys, chat_bundle, "and?", options=[*SETTINGS, "--load", str(path)])[0] == expected


@pytest.mark.parametrize(
    "command",
    ["/load ~nouser-of-this-name/x", "/save ~nouser-of-this-name/x", "/save a\0b", "/load a\0b",
     "/set temperature 1" + "0" * 400, "/set timeout 1" + "0" * 400, "/set max_tokens 1" + "0" * 5000],
    ids=lambda command: command[:20].replace("\0", "NUL"),
)  # fmt: skip
def test_no_command_ends_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, command: str
) -> None:
    out, err = chat(monkeypatch, capsys, chat_bundle, "hello", command, "/stats")
    assert out
    assert "error: " in err
    assert "prompt tokens" in err.splitlines()[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows inherits access rights")
def test_a_saved_conversation_is_its_writers_alone(tmp_path: Path) -> None:
    Conversation("s").save(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def test_half_a_surrogate_pair_is_saved_and_loaded_again(tmp_path: Path) -> None:
    conversation = Conversation()
    conversation.ask("é")
    conversation.answer("half \ud83d")
    conversation.save(tmp_path / "c.json")
    other = Conversation()
    other.load(tmp_path / "c.json")
    assert other.messages() == conversation.messages()


def test_help_names_every_command_and_unknown_ones_are_no_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    out, err = chat(monkeypatch, capsys, chat_bundle, "/help", "/dance", "/stats", "/quit", "never asked")
    assert out == ""
    for name in (
        "help",
        "undo",
        "retry",
        "edit",
        "reset",
        "system",
        "set",
        "save",
        "load",
        "stats",
        "quit",
        "continue",
        "context",
    ):
        assert f"  /{name}" in err
    assert "no command /dance" in err and "no answer yet" in err
    out, err = chat(monkeypatch, capsys, chat_bundle, "//path", "/stats")
    assert out == answer(chat_bundle, [user("/path")]) + "\n"
    assert "12 generated" in err


def test_an_error_leaves_the_conversation_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    hello = answer(chat_bundle, [user("hello")])
    out, err = chat(monkeypatch, capsys, chat_bundle, "long " * 500, "not \udcff text", "hello")
    assert out == hello + "\n"
    assert "context" in err and "Unicode" in err and err.count("error: ") == 2


def test_a_model_without_a_template_is_sent_to_run(tiny_bundle: Path, capsys: Captured) -> None:
    assert main(["chat", str(tiny_bundle)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no chat template" in err and "edgelm run" in err


def test_a_closed_input_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(chat_bundle)]) == 1
    assert "standard input is closed" in capsys.readouterr().err


def test_an_answer_that_ended_at_a_limit_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, tmp_path: Path
) -> None:
    first = answer(chat_bundle, [user("hello")])
    begun = {"messages": [user("hello"), assistant(first)], "continue_final_message": True}
    with load(chat_bundle) as engine:
        second = engine.generate(max_tokens=12, temperature=5.0, seed=3, **begun).text
    out, err = chat(
        monkeypatch, capsys, chat_bundle, "/continue", "hello", "/continue", f"/save {tmp_path / 'c'}", "/undo"
    )
    assert out == f"{first}\n{second}\n"
    assert "there is no answer to continue" in err and "saved 2 messages" in err and "taken back: hello" in err
    assert json.loads((tmp_path / "c").read_text(encoding="utf-8"))[1]["content"] == first + second


def test_the_oldest_turns_are_left_out_where_the_context_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, tmp_path: Path
) -> None:
    """The tiny model's context holds 512 tokens of one byte each."""
    options = [*SETTINGS, "--system", "be kind"]
    lines = [f"{number}" * 120 for number in range(9)]
    _, err = chat(
        monkeypatch, capsys, chat_bundle, *lines, "/context", f"/save {tmp_path / 'c'}", "/undo", "/reset", "/context",
        options=options,
    )  # fmt: skip
    assert "error" not in err and err.count("[length]") == 9
    assert err.count("the context of 512 tokens is full") == 1
    assert re.search(r"\d+ of 512 tokens; the oldest \d+ messages are no longer sent\n", err)
    assert err.endswith("0 of 512 tokens\n")
    saved = json.loads((tmp_path / "c").read_text(encoding="utf-8"))
    assert len(saved) == 19 and [message["content"] for message in saved[1::2]] == lines
    # The last answer answers the system message and the latest turns.
    last = [answer(chat_bundle, [saved[0], *saved[first:-1]]) for first in (13, 15, 17)]
    assert saved[-1]["content"] in last


def test_a_message_that_is_longer_than_the_context_leaves_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path
) -> None:
    _, err = chat(monkeypatch, capsys, chat_bundle, "hello", "x" * 600, "/context")
    assert "error: the prompt has" in err
    assert re.search(r"\n\d\d of 512 tokens\n$", err), "the first turn is still sent"


def test_turns_are_left_out_whole() -> None:
    conversation = Conversation("s")
    for text in "abc":
        conversation.ask(text)
        conversation.answer(text.upper())
    conversation.ask("d")
    sizes: list[int] = []
    conversation.leave_out(lambda messages: sizes.append(len(messages)) or len(messages) <= 4)
    assert [message["content"] for message in conversation.messages()] == ["s", "c", "C", "d"]
    assert sizes == [8, 6, 4] and conversation.left_out == 4 and len(conversation.everything()) == 8
    conversation.leave_out(lambda _: False)
    assert [message["content"] for message in conversation.messages()] == ["s", "d"], "the last turn stays"
    assert conversation.undo() == "d" and len(conversation.messages()) == 7, "there is room again"


def test_a_loaded_conversation_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    path.write_text(json.dumps([{"role": "system", "content": "be kind"}, user("hi"), assistant("yes?")]), "utf-8")
    expected = "[system] be kind\n> hi\nyes?\n"
    assert chat(monkeypatch, capsys, chat_bundle, f"/load {path}")[1] == f"{expected}loaded 2 messages\n"
    assert chat(monkeypatch, capsys, chat_bundle, options=["--load", str(path)])[1] == expected


def test_template_options_are_set_like_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, chat_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(chat_bundle, tmp_path / "b")
    template = bundle / "chat_template.jinja"
    template.write_text(TEMPLATE + "{{ mood }}", encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][template.name] = {"bytes": template.stat().st_size, "sha256": file_digest(template)}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    expected = answer(bundle, [user("hi")], template_variables={"mood": True})
    assert expected != answer(bundle, [user("hi")])
    assert chat(monkeypatch, capsys, bundle, "/set mood true", "hi") == (f"{expected}\n", "  mood = true\n\n[length]")
    options = [*SETTINGS, "--template-variable", "mood=true"]
    assert chat(monkeypatch, capsys, bundle, "hi", options=options)[0] == f"{expected}\n"


# ---- lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two ", "three"]),
        ("one two ten", ["one two ", "ten"]),
        ("12345678 x", ["12345678", "x"]),
        ("a\n\nb", ["a", "", "b"]),
        ("abcdefghijklmnop q", ["abcdefgh", "ijklmnop", "q"]),
        ("你好你好你", ["你好你好", "你"]),
        ("a 你好你好", ["a 你好你", "好"]),
        ("e\u0301e\u0301e\u0301e\u0301 abc", ["e\u0301e\u0301e\u0301e\u0301 abc"]),
        ("", [""]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_break_between_words_however_the_text_is_cut(text: str, lines: list[str], size: int) -> None:
    wrapping = Wrapping(lambda: 8)
    shown = "".join(wrapping.add(text[at : at + size]) for at in range(0, len(text), size)) + wrapping.finish()
    assert shown.split("\n") == lines


def test_no_line_is_too_long_and_nothing_but_blanks_is_lost() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    wrapping = Wrapping(lambda: 30)
    shown = "".join(map(wrapping.add, text)) + wrapping.finish()
    assert max(map(len, shown.split("\n"))) <= 30
    assert "".join(shown.split()) == "".join(text.split())


# ---- in a terminal


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "edgelm.runtime.cli", "chat", *arguments]
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, close_fds=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def expect(self, pattern: str) -> str:
        """Wait until the output not yet consumed matches the pattern; returns it up to the match's end."""
        deadline = time.monotonic() + 60
        while not self._waits(pattern, 1.0):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear: {self.seen!r}"
        found = re.search(pattern, self.seen)
        assert found is not None
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def _waits(self, pattern: str, seconds: float) -> bool:
        """Read until the pattern appears or the time is over; returns whether it appeared."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            if time.monotonic() > deadline:
                return False
            if select.select([self._ours], [], [], 0.5)[0]:
                self.seen += os.read(self._ours, 65_536).decode("utf-8", "replace")
        return True

    def interrupt(self, pattern: str) -> None:
        """Send Ctrl-C to the foreground process until the pattern appears. It is repeated after some seconds: Python's
        readline misses a signal in the moment before it waits for a key."""
        for _ in range(5):
            os.kill(self._process.pid, signal.SIGINT)
            if self._waits(pattern, 10):
                break
        self.expect(pattern)

    def wait(self) -> int:
        return self._process.wait(60)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(chat_bundle: Path) -> Iterator[Terminal]:
    pytest.importorskip("pty", reason="needs pseudo-terminals")
    opened = Terminal(str(chat_bundle), *SETTINGS)
    yield opened
    opened.close()


def test_a_session_in_a_terminal(terminal: Terminal) -> None:
    terminal.expect("/help lists the commands.*\n\\S*> ")
    terminal.type("hello\n")
    terminal.expect(r"hello\r\n")
    terminal.expect(r"\[length: /continue goes on\]\r\n\d+/512> ")
    terminal.type("/stats\n")
    terminal.expect("prompt tokens.*\n\\S*> ")
    # Ctrl-C does not end the session, neither at the prompt nor during an answer.
    terminal.type("half a lin")
    terminal.expect("half a lin")
    terminal.interrupt("Ctrl-D or /quit leaves.*\n\\S*> ")
    terminal.type("/set max_tokens 400\n")
    terminal.expect("max_tokens = 400\r\n\\S*> ")
    terminal.type("/set min_tokens 400\n")
    terminal.expect("min_tokens = 400\r\n\\S*> ")
    terminal.type("go on\n")
    terminal.expect(r"go on\r\n")
    terminal.expect(r"\S")
    terminal.interrupt(r"\[interrupted\][\s\S]*> |\[context_full\][\s\S]*> ")
    terminal.type("/undo\n")
    terminal.expect("taken back: go on\r\n\\S*> ")
    terminal.type("/undo\n")
    terminal.expect("taken back: hello\r\n\\S*> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_the_last_message_is_edited_in_the_line(terminal: Terminal) -> None:
    pytest.importorskip("readline", reason="needs readline")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect(r"\[length: /continue goes on\]\r\n\d+/512> ")
    terminal.type("/edit\n")
    terminal.expect("> hello")
    terminal.type(" you\n")
    terminal.expect(r"\[length: /continue goes on\]\r\n\d+/512> ")
    terminal.type("/undo\n")
    terminal.expect("taken back: hello you\r\n\\S*> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0


def test_what_is_typed_ahead_is_the_next_message_and_not_in_the_answer(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("/set max_tokens 60\n")
    terminal.expect("max_tokens = 60\r\n\\S*> ")
    terminal.type("/set min_tokens 60\n")
    terminal.expect("min_tokens = 60\r\n\\S*> ")
    terminal.type("hello\n")
    terminal.expect(r"hello\r\n")
    terminal.expect(r"\S")
    terminal.type("/stats\n")
    assert "/stats" not in terminal.expect(r"\[length: /continue goes on\]\r\n")
    terminal.expect(r"\d+/512> [\s\S]*60 generated")
    terminal.type("/quit\n")
    assert terminal.wait() == 0
