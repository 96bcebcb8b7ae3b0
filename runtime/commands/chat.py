"""`edgelm chat`: a conversation in the terminal. Answers go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine import Engine, load
from ..errors import EdgelmError, PromptError, TemplateError
from ..results import Stats
from ..settings import GenerationSettings
from ..text.conversation import Conversation
from .folder import add_provider
from .messages import add_chat_options, chat_options_of, value_of
from .run import summary
from .settings import add_settings, settings_of

SUMMARY = "talk with a model in the terminal"
_PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder that  edgelm export  wrote, of a model with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message for the conversation")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    add_provider(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (physical cores)")
    parser.add_argument(
        "--no-prefix-cache", action="store_true", help="neither use nor keep what is computed beyond this conversation"
    )
    add_chat_options(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load the bundle, then ask and answer until the end of the input."""
    settings, options = settings_of(arguments), chat_options_of(arguments)
    if sys.stdin is None:
        raise PromptError("standard input is closed, so there is nobody to chat with: open it, or use  edgelm run")
    conversation = Conversation()
    if arguments.load is not None:
        conversation.load(arguments.load)
    if arguments.system is not None:
        conversation.system = arguments.system
    known = not arguments.no_prefix_cache
    place = {"threads": arguments.threads, "provider": arguments.provider}
    with load(arguments.bundle, **place, response_cache=False, prefix_cache=known) as engine:
        if not engine.takes_messages:
            raise TemplateError(
                f"{arguments.bundle} has no chat template, so it cannot chat: continue a text with  edgelm run"
            )
        _Chat(engine, conversation, settings, options).loop()
    return 0


class _Chat:
    """The loop over what is typed. Errors are shown, and the conversation goes on."""

    def __init__(
        self, engine: Engine, conversation: Conversation, settings: GenerationSettings, options: dict[str, Any]
    ) -> None:
        self._engine = engine
        self._options = options
        self._conversation = conversation
        self._settings = settings
        self._stats: Stats | None = None
        self._leaving = False
        self._terminal = sys.stdin.isatty()
        # Editing and history of `input` come with this module, which not every system has.
        self._readline = _readline() if self._terminal else None
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "undo": ("", "take back the last message and its answer", self._undo),
            "retry": ("", "answer the last message again", self._retry),
            "edit": ("[TEXT]", "change the last message and answer it again", self._edit),
            "reset": ("", "forget the conversation, but not the system message", self._reset),
            "system": ("[TEXT]", "set the system message, or remove it", self._system),
            "set": ("[NAME VALUE]", "change a generation setting, or show them all: /set temperature 0.7", self._set),
            "save": ("FILE", "write the conversation to a new file", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "stats": ("", "what the last answer cost", self._show_stats),
            "quit": ("", "leave (Ctrl-D does too)", self._quit),
        }

    def loop(self) -> None:
        """Until the input ends or /quit."""
        if self._terminal:
            _note("/help lists the commands, Ctrl-C interrupts an answer, Ctrl-D leaves")
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are no UTF-8 are refused with the message that they are in, not with the session.
            sys.stdin.reconfigure(errors="surrogateescape")
        while not self._leaving:
            self._turn()
        if self._terminal:
            _note("")

    def _turn(self) -> None:
        """One line: a message or a command."""
        try:
            self._handle(input(_PROMPT if self._terminal else ""))
        except EOFError:
            self._leaving = True
        except KeyboardInterrupt:
            _note("\nCtrl-D or /quit leaves")
        except EdgelmError as error:
            _note(f"error: {error}")

    def _handle(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[1:] if line.startswith("//") else line)
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise PromptError(f"there is no command /{name}: /help lists them; // begins a message with one /")
        self._commands[name][2](rest.strip())

    def _answer(self, text: str, after: Conversation | None = None) -> None:
        """Ask after a conversation (the present one) and show the answer. One that is interrupted stays as far as it
        came; where nothing came the conversation is as it was."""
        conversation = (self._conversation if after is None else after).copy()
        conversation.ask(text)
        shown = ""
        try:
            request = {"messages": conversation.messages(), "settings": self._settings, **self._options}
            for chunk in self._engine.stream(**request):
                shown += chunk.text
                print(chunk.text, end="", flush=True)
                self._stats = chunk.stats or self._stats
                if chunk.finish_reason not in (None, "stop"):
                    _note(f"\n[{chunk.finish_reason}]", end="")
        except KeyboardInterrupt:
            _note("\n[interrupted]", end="")
        finally:
            if shown:
                print(flush=True)
                conversation.answer(shown)
                self._conversation = conversation
            else:
                _note("[no answer]")

    def _help(self, _: str) -> None:
        for name, (arguments, text, _command) in self._commands.items():
            _note(f"  /{f'{name} {arguments}':20}{text}")

    def _undo(self, _: str) -> None:
        _note(f"taken back: {self._conversation.undo()}")

    def _retry(self, _: str) -> None:
        before = self._conversation.copy()
        self._answer(before.undo(), before)

    def _edit(self, text: str) -> None:
        before = self._conversation.copy()
        last = before.undo()
        self._answer(text or self._typed(last), before)

    def _typed(self, text: str) -> str:
        """A line that begins as this text and is edited by the user."""
        if self._readline is None:
            raise PromptError("there is no line editing here: write the new message behind /edit")
        self._readline.set_startup_hook(lambda: self._readline.insert_text(text))
        try:
            return input(_PROMPT) or text
        finally:
            self._readline.set_startup_hook()

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        _note("the conversation is empty")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        _note("the system message is set" if text else "there is no system message")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self._settings = GenerationSettings.of(self._settings, {name: value_of(value.strip())})
        for key, now in asdict(self._settings).items():
            if name in ("", key):
                _note(f"  {key} = {json.dumps(now)}")

    def _save(self, name: str) -> None:
        self._conversation.save(_path(name))
        _note(f"saved {len(self._conversation)} messages")

    def _load(self, name: str) -> None:
        self._conversation.load(_path(name))
        _note(f"loaded {len(self._conversation)} messages")

    def _show_stats(self, _: str) -> None:
        _note(summary(self._stats) if self._stats is not None else "there is no answer yet")

    def _quit(self, _: str) -> None:
        self._leaving = True


def _path(name: str) -> Path:
    if not name:
        raise PromptError("a file's name is missing: write it behind the command")
    if "\0" in name:
        raise PromptError("a file's name holds no NUL character: give another name")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~name of a user that there is not
        raise PromptError(f"{name} names no folder ({error}): give another name") from error


def _readline() -> Any:
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None


def _note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
