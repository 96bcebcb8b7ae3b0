"""Where the compiled operators of edgelm's INT8 bundles are. edgelm finds them; nothing needs to be called."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

# Which functions the library computes, and how: edgelm uses the kernels that have the number it knows. It changes with
# them.
INTERFACE = 8

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = (Path(__file__).parent / "kernels").with_suffix(_SUFFIX)


def library() -> Path:
    """The library that onnxruntime registers (`SessionOptions.register_custom_ops_library`)."""
    return _LIBRARY


def arithmetic() -> str | None:
    """The instruction sets that the operators use on this processor; None if they have no code for it, and must not be
    registered. Raises: OSError, if the library is damaged or cannot be loaded."""
    _require_whole()
    tell = ctypes.CDLL(str(_LIBRARY)).edgelm_kernels_arithmetic
    tell.restype = ctypes.c_char_p
    name = tell()
    return None if name is None else name.decode()


def _require_whole() -> None:
    """The system's loader maps the file unread: one that ends early, or has lost a part, ends the process."""
    digest = hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()
    if _LIBRARY.with_suffix(".sha256").read_bytes() != digest.encode():
        raise OSError(f"{_LIBRARY} is damaged")
