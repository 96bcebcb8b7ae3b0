"""The only door to onnxruntime: imported late, with its usage reporting off, its errors mapped to ours.

onnxruntime 1.29 and newer sends usage data unless `ORT_DISABLE_TELEMETRY=1` stands in the environment before the
import. `ORT_GQA_DISABLE_FLASH_ATTENTION=1` turns off the CPU's flash attention inside GroupQueryAttention, whose
results depend on how a prompt is cut into pieces from about 300 tokens on (and which is slower for pieces).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

from .errors import SessionError

_ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1", "ORT_GQA_DISABLE_FLASH_ATTENTION": "1"}


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime with the environment it must see first.

    Returns: the module. Cost: about 0.1 s for the first call of a process, nothing afterwards.
    Raises: SessionError, if onnxruntime is not installed or cannot be loaded on this machine.
    """
    os.environ.update(_ENVIRONMENT)
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise SessionError(f"onnxruntime cannot be loaded ({error}): run  pip install onnxruntime") from error


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Every exception type that onnxruntime defines (they share no base class of their own), and those its binding
    layer raises for arguments that it cannot convert."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError)


@contextlib.contextmanager
def mapped_errors(doing: str, remedy: str) -> Iterator[None]:
    """Turn whatever onnxruntime raises inside the block into a SessionError.

    doing: what was attempted, as in "could not load model.onnx"; remedy: what the user can do.
    """
    load_onnxruntime()
    try:
        yield
    except onnxruntime_errors() as error:
        reason = " ".join(str(error).split())
        raise SessionError(f"{doing}: {reason}; {remedy}") from error
