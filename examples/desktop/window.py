"""The window: conversations on the left, the open one on the right, the model's status below."""

from __future__ import annotations

import queue
import time
import tkinter as tk
from collections.abc import Callable
from pathlib import Path
from tkinter import filedialog
from typing import Any

import psutil
from conversations import Conversation, Store
from layout import Layout
from models import Models
from worker import Done, Event, Failed, Loaded, Loading, Piece, Worker

_TICK_MS = 40
_SAVE_S = 0.5  # seconds between saves while an answer is streamed
_MB = 1e6
_TITLE_LETTERS = 29
_HINT = "Choose a model above, write below, and press Enter. Shift+Enter starts a new line."
_REASONS = {"length": "maximum length reached", "context_full": "the context is full", None: "stopped"}


class Window(Layout):
    """The user interface. It runs in one thread, which never computes and never waits."""

    def __init__(self, root: tk.Tk, worker: Worker, store: Store, models: Models, dark: bool) -> None:
        self._worker, self._store, self._models = worker, store, models
        self._conversations = store.all()
        self._open = store.new()
        self._answers: Conversation | None = None  # the conversation that is being answered
        self._ready = False
        self._saved = 0.0
        super().__init__(root, list(models.by_name), dark)
        self._list_conversations()
        self._show(self._conversations[0] if self._conversations else self._open)
        self._tick()

    # ---- user actions

    def open_model(self, name: str) -> None:
        """Load a model by its name in the chooser."""
        self._worker.stop()
        self._chooser.set(name)
        self._ready = False
        self._worker.open(self._models.by_name[name])
        self._update_buttons()

    def send(self) -> None:
        """Send the input, or stop the current answer."""
        if self._answers is not None:
            self._worker.stop()
            return
        text = self._input.get("1.0", "end-1c").strip()
        if not text or not self._ready:
            return
        self._input.delete("1.0", "end")
        self._open.ask(text)
        self._transcript.begin("user")
        self._transcript.add("user", text)
        self._transcript.begin("assistant")
        self._ask(goes_on=False)

    def go_on(self) -> None:
        """Continue a stopped answer."""
        if self._ready and self._answers is None and self._open.unfinished:
            answered = self._open.messages[-1]["role"] == "assistant"
            if answered:
                self._transcript.show(self._open, _HINT)
            else:
                self._transcript.begin("assistant")
            self._ask(goes_on=answered)

    def new(self) -> None:
        """Start a conversation."""
        self._show(self._store.new())
        self._input.focus_set()

    def delete(self) -> None:
        """Delete the open conversation. If it is being answered, only stop the answer."""
        if self._answers is self._open:
            self._worker.stop()
            return
        self._store.delete(self._open)
        self._conversations = [item for item in self._conversations if item is not self._open]
        self._list_conversations()
        self.new()

    def turn_light(self) -> None:
        """Switch between light and dark colours."""
        self._dark = not self._dark
        self._paint()

    def close(self) -> None:
        """Save an unfinished answer and close the window."""
        if self._answers is not None:
            self._store.save(self._answers)
        self._worker.close()
        self.root.destroy()

    def _ask(self, goes_on: bool) -> None:
        self._answers = self._open
        if self._open not in self._conversations:
            self._conversations.insert(0, self._open)
        self._save(self._open)
        self._list_conversations()
        self._worker.answer([dict(message) for message in self._open.messages], goes_on)
        self._update_buttons()

    def _return(self, event: tk.Event[Any]) -> str | None:
        if int(event.state) & 1:  # Shift
            return None
        if self._answers is None:
            self.send()
        return "break"

    def _open_folder(self) -> None:
        name = filedialog.askdirectory(parent=self.root, title="Folder of a model, or folder of models")
        if name:
            new = self._models.add(Path(name))
            self._chooser.configure(values=list(self._models.by_name))
            if new:
                self.open_model(new[0])
            else:
                self._say(f"{name} has no model that is not listed already. Create one with  edgelm export MODEL")

    def _choose_conversation(self) -> None:
        names = {conversation.name: conversation for conversation in self._conversations}
        chosen = [names[name] for name in self._list.selection()]
        if chosen and chosen[0] is not self._open:
            self._show(chosen[0])

    # ---- worker events

    def _tick(self) -> None:
        """Handle the worker's events, then show its progress."""
        while True:
            try:
                event = self._worker.events.get_nowait()
            except queue.Empty:
                break
            self._hear(event)
        self._show_progress()
        self.root.after(_TICK_MS, self._tick)

    def _hear(self, event: Event) -> None:
        hearers: dict[type, Callable[[Any], None]] = {
            Loading: self._hear_loading,
            Loaded: self._hear_loaded,
            Piece: self._hear_piece,
            Done: self._hear_done,
            Failed: self._hear_failure,
        }
        hearers[type(event)](event)

    def _hear_loading(self, event: Loading) -> None:
        self._say(f"Loading {event.path.name}: needs about {event.memory.total_bytes / _MB:,.0f} MB ...")

    def _hear_loaded(self, event: Loaded) -> None:
        self._ready = True
        self._say(f"{event.name} is ready, with room for {event.context_length:,} tokens.")
        self._show_memory()
        self._update_buttons()

    def _hear_piece(self, event: Piece) -> None:
        if self._answers is None:
            return
        self._answers.hear(event.text)
        if self._answers is self._open:
            self._transcript.add("assistant", event.text)
        if time.monotonic() - self._saved > _SAVE_S:
            self._save(self._answers)
            self._show_memory()

    def _hear_done(self, event: Done) -> None:
        conversation, self._answers = self._answers, None
        if conversation is None:
            return
        conversation.unfinished = event.reason != "stop"
        self._save(conversation)
        if conversation is self._open and conversation.unfinished:
            self._transcript.note(f"({_REASONS.get(event.reason, event.reason)}: press Continue)")
        if event.stats is not None:
            known = f" ({event.stats.reused_tokens:,} cached)" if event.stats.reused_tokens else ""
            self._say(
                f"{event.stats.prompt_tokens:,} tokens read{known}, first token after "
                f"{event.stats.time_to_first_token_s:.2f} s, {event.stats.generated_tokens:,} tokens written at "
                f"{event.stats.decode_tokens_per_s:.0f} tokens/s"
            )
        self._show_memory()
        self._update_buttons()

    def _hear_failure(self, event: Failed) -> None:
        if self._answers is not None:
            self._save(self._answers)
            self._answers = None
        self._transcript.note(event.text)
        self._say("")
        self._update_buttons()

    # ---- updates of the window

    def _show(self, conversation: Conversation) -> None:
        self._open = conversation
        self._transcript.show(conversation, _HINT)
        if conversation.unfinished and conversation is not self._answers and conversation.messages:
            self._transcript.note("(interrupted: press Continue)")
        self._mark()
        self._update_buttons()

    def _list_conversations(self) -> None:
        self._list.delete(*self._list.get_children())
        for conversation in self._conversations:
            self._list.insert("", "end", conversation.name, text=_short(conversation.title))
        self._mark()

    def _mark(self) -> None:
        self._list.selection_set([self._open.name] if self._open in self._conversations else [])

    def _update_buttons(self) -> None:
        answers = self._answers is not None
        self._button.configure(text="Stop" if answers else "Send", state="normal" if self._ready else "disabled")
        can = self._ready and not answers and self._open.unfinished and bool(self._open.messages)
        self._continue.configure(state="normal" if can else "disabled")

    def _show_progress(self) -> None:
        progress = self._worker.progress()
        if progress is None or not progress[1]:
            self._bar.configure(value=0.0)
            return
        done, total = progress
        self._bar.configure(value=done / total)
        self._say(f"Reading {done:,} of {total:,} tokens ..." if done < total else "Writing ...")

    def _show_memory(self) -> None:
        self._memory.configure(text=f"{psutil.Process().memory_info().rss / _MB:,.0f} MB of memory in use")

    def _say(self, text: str) -> None:
        self._status.configure(text=text)

    def _save(self, conversation: Conversation) -> None:
        self._store.save(conversation)
        self._saved = time.monotonic()


def _short(title: str) -> str:
    return title if len(title) <= _TITLE_LETTERS else f"{title[: _TITLE_LETTERS - 1].rstrip()}\u2026"
