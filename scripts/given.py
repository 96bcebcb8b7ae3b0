"""Types of arguments: files and folders that must be there. Otherwise the parser says so before anything is done."""

from __future__ import annotations

import argparse
from pathlib import Path


def existing_file(text: str) -> Path:
    """For argparse's `type`. Raises: ArgumentTypeError."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def existing_folder(text: str) -> Path:
    """For argparse's `type`. Raises: ArgumentTypeError."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)
