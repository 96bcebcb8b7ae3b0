"""Shared by the measurements: a device session, on the GPU or, to rehearse, on the CPU; results as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.sessions.graph import load_graph
from edgelm.runtime.sessions.loading import open_folder
from edgelm.runtime.sessions.on_device import DeviceSession
from edgelm.runtime.sessions.providers import CPU


def open_device(folder: Path, provider: str) -> tuple[Bundle, DeviceSession]:
    """provider: "cuda", or "cpu" for the same steps without a GPU."""
    if provider == "cuda":
        bundle, session = open_folder(folder, provider="cuda")
        assert isinstance(session, DeviceSession), "a bundle for cuda has a device session"
        return bundle, session
    bundle = Bundle.open(folder)
    return bundle, DeviceSession(load_graph(folder / GRAPH_NAME, 2, [CPU]), True, bundle.manifest.model, "cpu")


def prompt(length: int, vocabulary: int) -> list[int]:
    """Ids without a pattern, the same each time."""
    return [(index * 7919 + index * index * 31) % vocabulary for index in range(length)]


def record(file: Path, result: dict[str, Any]) -> None:
    """Append one result, and print it."""
    line = json.dumps(result)
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    print(line, flush=True)
