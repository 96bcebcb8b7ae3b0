"""Put the caches of the export's libraries below EDGELM_HOME, not into the user's home."""

from __future__ import annotations

import os

from ..runtime.errors import CacheError
from ..runtime.host.home import home

FOLDER_NAME = "libraries"
# The environment variable of each library, and the name of its folder.
_FOLDERS = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}


def redirect() -> None:
    """Set the variables, unless the user did. Call it before the libraries are imported."""
    try:
        root = home() / FOLDER_NAME
    except CacheError:  # there is no home: the libraries choose a place themselves, or fail
        return
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(root / name))
