"""The compiled operators of edgelm's INT8 bundles. edgelm finds them itself; users call nothing."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

# The version of the operators' interface. edgelm uses kernels only if it knows this number.
INTERFACE = 8

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = (Path(__file__).parent / "kernels").with_suffix(_SUFFIX)


def library() -> Path:
    """The library that onnxruntime registers (`SessionOptions.register_custom_ops_library`)."""
    return _LIBRARY


def arithmetic() -> str | None:
    """The instruction sets that the operators use on this processor; None if they have no code for it: then they must
    not be registered. Raises: OSError, if the library is damaged or cannot be loaded."""
    _require_whole()
    tell = ctypes.CDLL(str(_LIBRARY)).edgelm_kernels_arithmetic
    tell.restype = ctypes.c_char_p
    name = tell()
    return None if name is None else name.decode()


def _require_whole() -> None:
    """Compare the library with its digest: the system's loader would crash on a truncated or damaged file."""
    digest = hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()
    if _LIBRARY.with_suffix(".sha256").read_bytes() != digest.encode():
        raise OSError(f"{_LIBRARY} is damaged")
