"""A text that a command's user named."""

from __future__ import annotations

from pathlib import Path

from ..errors import PromptError


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file. Raises: PromptError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
