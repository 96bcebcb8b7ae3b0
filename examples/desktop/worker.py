"""The thread that owns the engine. It loads, answers and unloads, so that the window never waits.

Jobs and events go through queues. `stop` and `progress` act directly; both are thread-safe and return at once.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.runtime import EdgelmError, Engine, GenerationSettings, MemoryEstimate, Stats, estimate_memory, load

# Share of the context that stays free for the answer.
_ROOM = 0.25


@dataclass(frozen=True)
class Loading:
    """A model is being loaded. memory: estimate of what it will need."""

    path: Path
    memory: MemoryEstimate


@dataclass(frozen=True)
class Loaded:
    """The model is ready."""

    path: Path
    name: str
    context_length: int


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete, or was stopped (reason: None)."""

    reason: str | None
    stats: Stats | None


@dataclass(frozen=True)
class Failed:
    """An error. text: message for the user."""

    text: str


Event = Loading | Loaded | Piece | Done | Failed


class Worker:
    """Loads one model at a time and gives one answer at a time."""

    def __init__(self, settings: GenerationSettings) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._settings = settings
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._stream: Any = None
        self._stopped = threading.Event()
        # A daemon, so that a running step does not keep the program alive after the window is closed.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # ---- called from the window's thread

    def open(self, path: Path) -> None:
        """Load a model. Unloads the current one first."""
        self._jobs.put(lambda: self._open(path))

    def answer(self, messages: list[dict[str, str]], goes_on: bool = False) -> None:
        """Answer a conversation. goes_on: continue its last message, a stopped answer."""
        self._stopped.clear()
        self._jobs.put(lambda: self._answer(messages, goes_on))

    def stop(self) -> None:
        """Stop the current answer after the current step."""
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.close()

    def progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt that are read, and their total; None if no answer is being computed."""
        stream = self._stream
        return None if stream is None else stream.progress

    def close(self, patience_s: float = 2.0) -> None:
        """Stop, unload, end the thread."""
        self.stop()
        self._jobs.put(None)
        self._thread.join(patience_s)

    # ---- run in the engine's thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except EdgelmError as error:
                self.events.put(Failed(str(error)))
        self._unload()

    def _unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _open(self, path: Path) -> None:
        self._unload()
        self.events.put(Loading(path, estimate_memory(path)))
        # The prefix cache keeps a conversation's KV cache on disk, so that it continues at once after a restart.
        self._engine = load(path, prefix_cache=True, response_cache=False)
        self._engine.warm_up()
        self.events.put(Loaded(path, self._engine.bundle.manifest.name, self._engine.context_length))

    def _answer(self, messages: list[dict[str, str]], goes_on: bool) -> None:
        if self._engine is None:
            self.events.put(Failed("No model is loaded. Choose one first."))
            return
        stats = reason = None
        with contextlib.ExitStack() as stack:
            self._stream = stack.enter_context(self._engine.stream(**self._request(self._engine, messages, goes_on)))
            stack.callback(self._forget_stream)
            if self._stopped.is_set():
                self._stream.close()
            for chunk in self._stream:
                if chunk.text:
                    self.events.put(Piece(chunk.text))
                reason = chunk.finish_reason
            stats = self._stream.stats
        self.events.put(Done(reason, stats))

    def _forget_stream(self) -> None:
        self._stream = None

    def _request(self, engine: Engine, messages: list[dict[str, str]], goes_on: bool) -> dict[str, Any]:
        """Arguments of `Engine.stream`. Drops the oldest turns until the conversation fits into the context."""
        room = int(engine.context_length * (1 - _ROOM))
        if not engine.takes_messages:  # a base model, which continues a text
            ids = engine.encode("".join(message["content"] for message in messages))
            return {"token_ids": ids[-room:], "settings": self._settings}
        options: dict[str, Any] = {"continue_final_message": True} if goes_on else {}
        while len(messages) > 2 and len(engine.encode(messages=messages, **options)) > room:
            messages = messages[2:]
        return {"messages": messages, "settings": self._settings, **options}
