"""The libraries that an export needs: whether they are installed, where they keep their caches, what they print."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.errors import CacheError, MissingExtraError
from ..runtime.host.home import home

_NEEDS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "matplotlib", "rich", "accelerate", "peft", "gguf")
FOLDER_NAME = "libraries"
# The environment variable of each library, and the name of its folder.
_FOLDERS = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}


def redirect() -> None:
    """Put the libraries' caches below EDGELM_HOME, not into the user's home, unless the user set their variables. Call
    it before the libraries are imported."""
    try:
        root = home() / FOLDER_NAME
    except CacheError:  # there is no home: the libraries choose a place themselves, or fail
        return
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(root / name))


def require_extra(command: str) -> None:
    """Raises: MissingExtraError, unless the packages of the extra `export` are there."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDS):
        raise MissingExtraError(command, "export")


@contextmanager
def collector_off() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off. torch.export and onnx_ir make very many objects and hardly any
    cycles: the collector's walks over them take a tenth of the time and free nothing."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and advice off the screen: the stages say what happens."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
