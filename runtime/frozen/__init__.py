"""Frozen programs: PyInstaller hooks for modules and files that edgelm loads by name only.

PyInstaller finds this folder by the entry point `pyinstaller40`, and runs the hook of each module that a program
imports. Nothing here is imported when a program runs.
"""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    """Where PyInstaller finds the hooks."""
    return [str(Path(__file__).parent)]
