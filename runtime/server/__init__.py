"""edgelm.runtime.server: bundles behind OpenAI's HTTP interface, as an ASGI application (extra "serve").

    from edgelm.runtime.server import app
    application = app("bundle")          # for uvicorn, or to be mounted in another Starlette program

The only folder that imports Starlette and uvicorn. It does not decode: it turns requests into calls of
`Engine.astream`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .application import app
    from .settings import ServerSettings

_HOME = {"ServerSettings": "settings", "app": "application"}

__all__ = ["ServerSettings", "app"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
