"""edgelm.export: turn a Hugging Face causal language model into a bundle for `edgelm.runtime`.

    from edgelm.export import ExportConfig, export_model
    export_model(ExportConfig("builtin:tales", target="x86-cpu", out=Path("tales")))

Needs the extra: pip install "edgelm[export]". torch, transformers and onnx are imported when something is exported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compress.run import compress_model
    from .config import ExportConfig
    from .pipeline import ExportResult, export_model

_HOME = {
    "ExportConfig": "config",
    "ExportResult": "pipeline",
    "compress_model": "compress.run",
    "export_model": "pipeline",
}

__all__ = ["ExportConfig", "ExportResult", "compress_model", "export_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
