"""The files of a bundle besides graph and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.bundle.folder import file_digest
from ...runtime.bundle.manifest import FileEntry


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, ending in a line feed."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file of a folder, sorted by name."""
    return {path.name: FileEntry(path.stat().st_size, file_digest(path)) for path in sorted(folder.iterdir())}
