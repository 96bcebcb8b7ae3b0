"""edgelm.runtime: load a bundle and generate text, without PyTorch.

    from edgelm.runtime import load
    with load("bundle") as engine:
        print(engine.generate("Once upon a time").text)

Importing this package is cheap: onnxruntime, tokenizers and numpy are imported when something is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle
    from .engine import Chunk, Completion, Engine, Stats, load
    from .errors import EdgelmError
    from .manifest import Manifest
    from .response_cache import ResponseCacheSettings

_HOME = {
    "Bundle": "bundle",
    "Chunk": "engine",
    "Completion": "engine",
    "EdgelmError": "errors",
    "Engine": "engine",
    "Manifest": "manifest",
    "ResponseCacheSettings": "response_cache",
    "Stats": "engine",
    "load": "engine",
}

__all__ = [
    "Bundle",
    "Chunk",
    "Completion",
    "EdgelmError",
    "Engine",
    "Manifest",
    "ResponseCacheSettings",
    "Stats",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
