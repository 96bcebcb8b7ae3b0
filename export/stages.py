"""Named stages over one context: each is timed, its peak memory noted, and a failure says where the export stood."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..runtime.errors import EdgelmError
from ..runtime.host import machine
from .errors import StageError

C = TypeVar("C")
_SAMPLE_S = 0.2


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage cost. peak_bytes: most physical memory of the process, sampled 20 times a second."""

    name: str
    seconds: float
    peak_bytes: int


class Progress(Protocol):
    """Whoever wants to watch an export."""

    def started(self, name: str) -> None:
        """A stage begins."""

    def finished(self, record: StageRecord) -> None:
        """A stage is done."""


Stage = tuple[str, Callable[[C], None]]


def run_stages(context: C, stages: Sequence[Stage[C]], subject: str, progress: Progress | None) -> list[StageRecord]:
    """Run stages in order. subject: what is exported, for messages.

    Raises: EdgelmError as the stage raised it, with a note of where it happened; OSError likewise; anything else as a
    StageError, since nobody foresaw it.
    """
    records: list[StageRecord] = []
    for name, function in stages:
        if progress is not None:
            progress.started(name)
        before = ", ".join(record.name for record in records) or "none"
        where = f"in stage {name!r} of {subject}, after: {before}"
        with _PeakMemory() as memory:
            started = time.perf_counter()
            try:
                function(context)
            except (EdgelmError, OSError) as error:
                error.add_note(where) if hasattr(error, "add_note") else None
                raise
            except Exception as error:
                raise StageError(f"unexpected {type(error).__name__} {where}: {error}") from error
        records.append(StageRecord(name, time.perf_counter() - started, memory.peak))
        if progress is not None:
            progress.finished(records[-1])
    return records


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
