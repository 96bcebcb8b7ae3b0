"""Whether the disk has room for what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import OutputError


def require_bytes(needed: int, folder: Path, what: str) -> None:
    """Raise OutputError where a folder, which need not exist yet, has less room than this."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{what} takes {needed / 1e6:,.0f} MB, and {folder} has room for {free / 1e6:,.0f} MB: free some space or "
            "choose another place with --out"
        )
