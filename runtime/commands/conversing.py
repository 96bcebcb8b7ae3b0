"""The loop of `edgelm chat`: each line is a message, which gets an answer, or a command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import EdgelmError, PromptError
from ..results import Stats
from ..settings import GenerationSettings
from ..text.conversation import Conversation
from .messages import value_of
from .run import summary
from .terminal import Terminal, note

_PROMPT = "> "


class Chat:
    """One conversation. Errors are shown and do not end it."""

    def __init__(
        self, engine: Engine, conversation: Conversation, settings: GenerationSettings, options: Mapping[str, Any]
    ) -> None:
        """options: those of `ChatOptions` that were given."""
        self._engine = engine
        self._conversation = conversation
        self._settings = settings
        self._options = {**options, "template_variables": dict(options.get("template_variables", {}))}
        self._stats: Stats | None = None
        self._leaving = False
        self._terminal = Terminal()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "continue": ("", "continue the last answer, if a limit ended it", self._continue),
            "undo": ("", "take back the last message and its answer", self._undo),
            "retry": ("", "answer the last message again", self._retry),
            "edit": ("[TEXT]", "change the last message and answer it again", self._edit),
            "reset": ("", "forget the conversation except the system message", self._reset),
            "system": ("[TEXT]", "set the system message, or remove it", self._system),
            "set": ("[NAME VALUE]", "change a setting or a template variable: /set temperature 0.7", self._set),
            "save": ("FILE", "write the conversation to a new file", self._save),
            "load": ("FILE", "continue a saved conversation", self._load),
            "context": ("", "how full the context is", self._show_context),
            "stats": ("", "what the last answer cost", self._show_stats),
            "quit": ("", "leave (Ctrl-D does too)", self._quit),
        }

    def loop(self) -> None:
        """Until the input ends or /quit."""
        if self._terminal.is_there:
            note("/help lists the commands, Ctrl-C interrupts an answer, Ctrl-D leaves")
        self._show_conversation()
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A message with bytes that are not UTF-8 is refused; the session goes on.
            sys.stdin.reconfigure(errors="surrogateescape")
        while not self._leaving:
            self._turn()
        if self._terminal.is_there:
            note("")

    def _turn(self) -> None:
        """One line: a message or a command."""
        try:
            self._handle(self._terminal.ask(self._prompt()))
        except EOFError:
            self._leaving = True
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves")
        except EdgelmError as error:
            note(f"error: {error}")

    def _prompt(self) -> str:
        """The text in front of the input, with how full the context is, once there is something in it."""
        used = self._used() if self._terminal.is_there and len(self._conversation) else None
        return _PROMPT if used is None else f"{used}/{self._context_length}{_PROMPT}"

    def _handle(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line, self._conversation)
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise PromptError(f"there is no command /{name}: /help lists them; // begins a message with one /")
        self._commands[name][2](rest.strip())

    def _ask(self, text: str, before: Conversation) -> None:
        """Add a message to the conversation `before` and show the answer. This becomes the present conversation."""
        conversation = before.copy()
        conversation.ask(text)
        self._answer(conversation, {})

    def _answer(self, conversation: Conversation, begun: Mapping[str, Any]) -> None:
        """Generate and show the next message. An interrupted answer is kept as far as it came; if nothing came, the
        present conversation does not change. begun: the options that make the answer continue the last message."""
        self._fit(conversation, begun)
        shown = ""
        request = {"messages": conversation.messages(), "settings": self._settings, **self._options, **begun}
        try:
            with self._terminal.answering() as show:
                for chunk in self._engine.stream(**request):
                    shown += chunk.text
                    show(chunk.text)
                    self._stats = chunk.stats or self._stats
                    reason = chunk.finish_reason
            if reason not in (None, "stop"):
                note(f"\n[{reason}{': /continue goes on' if self._terminal.is_there else ''}]", end="")
        except KeyboardInterrupt:
            note("\n[interrupted]", end="")
        finally:
            if shown:
                print(flush=True)
                conversation.answer(shown)
                self._conversation = conversation
            else:
                note("[no answer]")

    def _fit(self, conversation: Conversation, begun: Mapping[str, Any]) -> None:
        """Leave out the oldest turns if the context has no room for an answer. Half of it is freed at once: every
        change at the beginning means that the rest must be computed again."""
        context = self._context_length
        room = min(self._settings.max_tokens, context // 4)
        if self._count(conversation.messages(), begun) <= context - room:
            return
        first = not conversation.left_out
        conversation.leave_out(lambda messages: self._count(messages, begun) <= context // 2)
        if first and conversation.left_out:
            note(
                f"[the context of {context} tokens is full: the oldest messages are no longer sent to the model, the "
                "system message and the latest ones are]"
            )

    @property
    def _context_length(self) -> int:
        return self._engine.bundle.manifest.model.context_length

    def _count(self, messages: Sequence[Mapping[str, Any]], begun: Mapping[str, Any]) -> int:
        return len(self._engine.encode(messages=messages, **self._options, **begun))

    def _used(self) -> int | None:
        """Tokens of the conversation; None if the template refuses a conversation that ends like this one."""
        try:
            return self._count(self._conversation.messages(), {})
        except EdgelmError:
            return None

    def _help(self, _: str) -> None:
        for name, (arguments, text, _command) in self._commands.items():
            note(f"  /{f'{name} {arguments}':20}{text}")

    def _continue(self, _: str) -> None:
        conversation = self._conversation.copy()
        if not conversation.is_answered:
            raise PromptError("there is no answer to continue: write a message, or /retry")
        self._answer(conversation, {"continue_final_message": True})

    def _undo(self, _: str) -> None:
        note(f"taken back: {self._conversation.undo()}")

    def _retry(self, _: str) -> None:
        before = self._conversation.copy()
        self._ask(before.undo(), before)

    def _edit(self, text: str) -> None:
        before = self._conversation.copy()
        last = before.undo()
        if not text and not self._terminal.edits:
            raise PromptError("there is no line editing here: write the new message behind /edit")
        self._ask(text or self._terminal.edit(_PROMPT, last), before)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        note("the conversation is empty")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        note("the system message is set" if text else "there is no system message")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        variables = self._options["template_variables"]
        known = asdict(self._settings)
        if name and name not in known and name in self._engine.template_variables:
            variables[name] = value_of(value.strip())
        elif name:
            self._settings = GenerationSettings.of(self._settings, {name: value_of(value.strip())})
        for key, now in {**asdict(self._settings), **variables}.items():
            if name in ("", key):
                note(f"  {key} = {json.dumps(now)}")

    def _save(self, name: str) -> None:
        self._conversation.save(_path(name))
        note(f"saved {len(self._conversation)} messages")

    def _load(self, name: str) -> None:
        self._conversation.load(_path(name))
        self._show_conversation()
        note(f"loaded {len(self._conversation)} messages")

    def _show_conversation(self) -> None:
        """Show the messages so far as they looked when they were written."""
        for message in self._conversation.everything():
            head = {"user": _PROMPT, "assistant": ""}.get(message["role"], f"[{message['role']}] ")
            note(f"{head}{message['content']}")

    def _show_context(self, _: str) -> None:
        used = self._used() if len(self._conversation) else 0
        left_out = self._conversation.left_out
        note(
            ("this conversation cannot be counted" if used is None else f"{used} of {self._context_length} tokens")
            + (f"; the oldest {left_out} messages are no longer sent" if left_out else "")
        )

    def _show_stats(self, _: str) -> None:
        note(summary(self._stats) if self._stats is not None else "there is no answer yet")

    def _quit(self, _: str) -> None:
        self._leaving = True


def _path(name: str) -> Path:
    if not name:
        raise PromptError("a file's name is missing: write it behind the command")
    if "\0" in name:
        raise PromptError("a file's name holds no NUL character: give another name")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise PromptError(f"{name} names no folder ({error}): give another name") from error
