"""Check for free disk space before writing."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import OutputError


def require_bytes(needed: int, folder: Path, what: str) -> None:
    """Raise OutputError if the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{what} takes {needed / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free: free some space or "
            "choose another folder with --out"
        )
