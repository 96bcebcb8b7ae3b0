"""Where the libraries of an export keep what they make for themselves: below EDGELM_HOME, not in the user's home."""

from __future__ import annotations

import os

from ..runtime.errors import CacheError
from ..runtime.host.home import home

FOLDER_NAME = "libraries"
# The variable by which each library is told, and the name of its folder.
_FOLDERS = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}


def redirect() -> None:
    """Tell the libraries, before they are imported, unless the user did. Changes this process's environment."""
    try:
        root = home() / FOLDER_NAME
    except CacheError:  # no home at all: they find another place, or say so
        return
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(root / name))
