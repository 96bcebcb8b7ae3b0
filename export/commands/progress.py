"""Progress output of the exporter's commands, and the check that the extra is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ...runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console

    from ..stages import StageRecord

_NEEDS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "matplotlib", "rich", "accelerate", "peft", "gguf")


def require_extra(command: str) -> None:
    """Raises: MissingExtraError, unless the packages of the extra `export` are installed."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDS):
        raise MissingExtraError(command, "export")


class RichProgress:
    """One line for each stage: a spinner while it runs, then its time and peak memory."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Any = None
        self._name = ""

    def started(self, name: str) -> None:
        """A stage begins."""
        self._name = name
        if self._console.is_terminal:
            self._status = self._console.status(name)
            self._status.start()

    def say(self, line: str) -> None:
        """Show the progress within a stage: beside the spinner on a terminal, as a line of its own elsewhere."""
        if self._status is None:
            self._console.print(f"{self._name}: {line}")
        else:
            self._status.update(f"{self._name}: {line}")

    def finished(self, record: StageRecord) -> None:
        """A stage is done."""
        self.stop()
        self._console.print(
            f"[green]done[/] {record.name:20}{record.seconds:8.1f} s{record.peak_bytes / 1e6:10,.0f} MB peak"
        )

    def stop(self) -> None:
        """Remove the spinner."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def quiet_libraries() -> None:
    """Silence transformers' progress bars and advice: the stages show the progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
