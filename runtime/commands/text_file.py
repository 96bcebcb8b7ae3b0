"""A text file that the user named."""

from __future__ import annotations

from pathlib import Path

from ..errors import PromptError
from ..host import files


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file. Raises: PromptError."""
    try:
        return files.read_text(path)
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): give a text file") from error
