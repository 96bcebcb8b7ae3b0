"""Named stages: each has its time and peak memory recorded, and a failure names the stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..runtime.errors import EdgelmError
from ..runtime.host import machine
from .errors import StageError

_SAMPLE_S = 0.2


@dataclass(frozen=True)
class StageRecord:
    """Figures of a finished stage. peak_bytes: largest physical memory of the process, sampled 5 times a second."""

    name: str
    seconds: float
    peak_bytes: int


class Progress(Protocol):
    """An observer of an export."""

    def started(self, name: str) -> None:
        """A stage begins."""

    def say(self, line: str) -> None:
        """How far the stage is, in words."""

    def finished(self, record: StageRecord) -> None:
        """A stage has finished."""


class Stages:
    """The stages of an export or a compression. subject: what is exported, for messages."""

    def __init__(self, subject: str, progress: Progress | None) -> None:
        self._subject = subject
        self._progress = progress
        self._records: dict[str, StageRecord] = {}

    @property
    def records(self) -> list[StageRecord]:
        """The finished stages in order. A stage that ran several times is one record with its total time."""
        return list(self._records.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage: the block is timed and watched.

        Raises: EdgelmError and OSError as the block raised them, with a note of the stage; any other error as a
        StageError.
        """
        if self._progress is not None:
            self._progress.started(name)
        started = time.perf_counter()
        with _PeakMemory() as memory, self._saying_where(name):
            yield
        record = StageRecord(name, time.perf_counter() - started, memory.peak)
        self._records[name] = _together(self._records.get(name), record)
        if self._progress is not None:
            self._progress.finished(record)

    @contextmanager
    def _saying_where(self, name: str) -> Iterator[None]:
        before = ", ".join(self._records) or "none"
        where = f"in stage {name!r} of {self._subject}, after: {before}"
        try:
            yield
        except (EdgelmError, OSError) as error:
            error.add_note(where)
            raise
        except Exception as error:
            raise StageError(f"unexpected {type(error).__name__} {where}: {error}") from error


def _together(first: StageRecord | None, second: StageRecord) -> StageRecord:
    if first is None:
        return second
    return StageRecord(first.name, first.seconds + second.seconds, max(first.peak_bytes, second.peak_bytes))


class _PeakMemory:
    """Samples this process's memory in a thread while the block runs. Portable, unlike the kernel's own peak."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, machine.resident_bytes())
            if self._done.wait(_SAMPLE_S):
                self.peak = max(self.peak, machine.resident_bytes())
                return
