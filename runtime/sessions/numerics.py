"""Identify the machine for cache keys: what decides the last bits of logits besides the bundle."""

from __future__ import annotations

import platform
import sys

from ..host.machine import instruction_sets
from . import kernels
from .protocol import Session
from .providers import gpu_names

# Prefixes of the instruction sets by which onnxruntime chooses its kernels, as Linux names them on x86 and Arm.
_KERNEL_SETS = ("avx", "fma", "amx", "f16c", "sse4_1", "asimd", "i8mm", "sve", "bf16", "sme")


def of_machine() -> str:
    """Processor, instruction sets, onnxruntime's version, and the compiled kernels if there are any.

    Two machines with the same text compute the same answers, bit for bit. The version is that of the loaded
    onnxruntime.
    """
    sets = "+".join(sorted(name for name in instruction_sets() if name.startswith(_KERNEL_SETS)))
    sets = sets or platform.processor()
    version = getattr(sys.modules.get("onnxruntime"), "__version__", "none")
    parts = (platform.machine().lower(), sets, f"onnxruntime {version}", kernels.identity())
    return " ".join(part for part in parts if part)


def of_session(session: Session) -> str:
    """As `of_machine`, with the GPU if the session computes on one."""
    device = session.capabilities.device
    return of_machine() if device == "cpu" else f"{of_machine()} {device} {' + '.join(gpu_names())}"
