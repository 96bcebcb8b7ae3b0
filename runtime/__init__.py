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
    from .bundle.folder import Bundle
    from .bundle.manifest import Manifest
    from .caches.prefixes.cache import PrefixCacheSettings
    from .caches.responses.cache import ResponseCacheSettings
    from .engine import Engine
    from .errors import EdgelmError
    from .estimate import MemoryEstimate, estimate_memory
    from .opening import load
    from .results import Chunk, Completion, Stats, TokenLogprob
    from .serving.streams import Stream
    from .settings import GenerationSettings

_HOME = {
    "Bundle": "bundle.folder",
    "Chunk": "results",
    "Completion": "results",
    "EdgelmError": "errors",
    "Engine": "engine",
    "GenerationSettings": "settings",
    "Manifest": "bundle.manifest",
    "MemoryEstimate": "estimate",
    "PrefixCacheSettings": "caches.prefixes.cache",
    "ResponseCacheSettings": "caches.responses.cache",
    "Stats": "results",
    "Stream": "serving.streams",
    "TokenLogprob": "results",
    "estimate_memory": "estimate",
    "load": "opening",
}

__all__ = [
    "Bundle",
    "Chunk",
    "Completion",
    "EdgelmError",
    "Engine",
    "GenerationSettings",
    "Manifest",
    "MemoryEstimate",
    "PrefixCacheSettings",
    "ResponseCacheSettings",
    "Stats",
    "Stream",
    "TokenLogprob",
    "estimate_memory",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
