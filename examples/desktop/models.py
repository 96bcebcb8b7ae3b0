"""The available models: bundles in given folders, and those that the user opened."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

_CHOSEN = "chosen.json"


class Models:
    """Bundles by their name in the chooser. Folders that the user opens are saved in the program's data folder."""

    def __init__(self, folders: Iterable[Path], data: Path) -> None:
        """folders: bundles or folders of bundles; data: the program's data folder."""
        self._file = data / _CHOSEN
        self.by_name: dict[str, Path] = {}
        for folder in [*folders, *self._remembered()]:
            self._find(folder)

    def add(self, folder: Path) -> list[str]:
        """Add a bundle or a folder of bundles and save it. Returns the new names."""
        before = set(self.by_name)
        self._find(folder)
        new = [name for name in self.by_name if name not in before]
        if new:
            kept = [*self._remembered(), folder]
            scratch = self._file.with_suffix(".tmp")
            scratch.write_text(json.dumps([str(path) for path in kept]), encoding="utf-8")
            scratch.replace(self._file)
        return new

    def _find(self, folder: Path) -> None:
        own = folder / "manifest.json"
        for manifest in [own] if own.is_file() else sorted(folder.glob("*/manifest.json")):
            path = manifest.parent.absolute()
            if path not in self.by_name.values():
                name = path.name if path.name not in self.by_name else str(path)
                self.by_name[name] = path

    def _remembered(self) -> list[Path]:
        try:
            return [Path(name) for name in json.loads(self._file.read_text(encoding="utf-8")) if isinstance(name, str)]
        except (OSError, ValueError, TypeError):
            return []
