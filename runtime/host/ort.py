"""The only place that imports onnxruntime: late, with its usage reporting off, and its errors mapped to ours.

onnxruntime 1.29 and newer sends usage data unless `ORT_DISABLE_TELEMETRY=1` is set before the import.
`ORT_GQA_DISABLE_FLASH_ATTENTION=1` turns off the CPU's flash attention inside GroupQueryAttention: from about 300
tokens on its results depend on how a prompt is cut into pieces, and it is slower for pieces.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from ..errors import SessionError

_WARNING, _FATAL = 2, 4
_BITS_32 = 2**32
# A graph of one operator, y = Identity(x) with x float32 (1), as ONNX writes it.
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a"
    "08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
_ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1", "ORT_GQA_DISABLE_FLASH_ATTENTION": "1"}


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime after setting the environment variables that it reads at import.

    Returns: the module. Cost: about 0.1 s for the first call of a process, nothing afterwards.
    Raises: SessionError, if onnxruntime is not installed or cannot be loaded on this machine.
    """
    os.environ.update(_ENVIRONMENT)
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        # There is no wheel for 32 bits, so pip cannot help.
        remedy = (
            "run  pip install onnxruntime"
            if sys.maxsize > _BITS_32
            else "this Python has 32 bits; install the 64-bit system, which it needs (Raspberry Pi OS has both)"
        )
        raise SessionError(f"onnxruntime cannot be loaded ({error}): {remedy}") from error


def can_start(provider: str) -> bool:
    """Whether an execution provider that onnxruntime lists can really start here, with its libraries and its device.

    Cost: nothing for the CPU's; for others a session over one operator, the first time a second or more.
    """
    onnxruntime = load_onnxruntime()
    if provider not in onnxruntime.get_available_providers():
        return False
    if provider == "CPUExecutionProvider":
        return True
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        return provider in onnxruntime.InferenceSession(_IDENTITY, providers=[provider]).get_providers()
    except onnxruntime_errors():
        return False
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Every exception type that onnxruntime defines (they have no common base class), and those that its binding raises
    for arguments that it cannot convert."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError)


@contextlib.contextmanager
def mapped_errors(doing: str, remedy: str) -> Iterator[None]:
    """Turn errors of onnxruntime inside the block into a SessionError.

    doing: what was attempted, as in "could not load model.onnx"; remedy: what the user can do.
    """
    load_onnxruntime()
    try:
        yield
    except onnxruntime_errors() as error:
        reason = " ".join(str(error).split())
        raise SessionError(f"{doing}: {reason}; {remedy}") from error
