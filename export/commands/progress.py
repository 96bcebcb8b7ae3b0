"""What the exporter's commands show while they work, and what they need to be installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.host.files import naming
from ..errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from ..stages import StageRecord

_QUIET_S = 10.0


class LogFile:
    """A file of lines with the time in front, each of which is in the file at once. Safe between threads."""

    def __init__(self, path: Path) -> None:
        """Append to a file. Raises: OutputError."""
        try:
            with naming(path):
                self._file, self._lock = path.open("a", encoding="utf-8", buffering=1), threading.Lock()
        except OSError as error:
            raise OutputError(f"--log {path} cannot be written ({error.strerror}): name another file") from error

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        """Add a line."""
        with self._lock:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class RichProgress:
    """One line for each stage: a spinner while it runs, then its time and peak memory. Without a terminal, a line after
    every ten seconds in which the stage prints none."""

    def __init__(self, console: Console, log: LogFile | None = None, *, announce: bool = False) -> None:
        """log: gets all lines too. announce: also print a line when a stage begins; an export that is refused prints
        nothing but its error."""
        self._console, self._log, self._announce = console, log, announce
        self._status: Any = None
        self._name, self._started, self._told = "", 0.0, 0.0
        self._pulse: _Pulse | None = None

    def started(self, name: str) -> None:
        """A stage begins."""
        self._name, self._started = name, time.monotonic()
        if self._console.is_terminal:
            self._status = self._console.status(name)
            self._status.start()
        self._told = self._started
        if self._announce:
            self._tell(f"{name}: begins")
        self._pulse = _Pulse(self._beat)

    def say(self, line: str) -> None:
        """Show the progress within a stage: beside the spinner on a terminal, as a line of its own elsewhere."""
        self._tell(f"{self._name}: {line}")

    def finished(self, record: StageRecord) -> None:
        """A stage is done."""
        self.stop()
        line = f"{record.name:20}{record.seconds:8.1f} s{record.peak_bytes / 1e6:10,.0f} MB peak"
        self._console.print(f"[green]done[/] {line}", soft_wrap=True)
        if self._log is not None:
            self._log.write(f"done {line}")

    def stop(self) -> None:
        """Remove the spinner."""
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _tell(self, line: str) -> None:
        self._told = time.monotonic()
        if self._status is None:
            self._console.print(line, soft_wrap=True)  # one line for a file or a pipe
        else:
            self._status.update(line)
        if self._log is not None:
            self._log.write(line)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._told >= _QUIET_S:
            self._tell(f"{self._name}: {now - self._started:.0f} s so far")


class _Pulse:
    """Calls a function every second, in a thread, until it is stopped."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat, self._done = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when no call is running and none will come."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(1.0):
            self._beat()
