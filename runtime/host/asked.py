"""Ask macOS and Windows about the processor: instruction sets and number of cores. (Linux has files for that.)"""

from __future__ import annotations

import ctypes
import sys

# Linux's name of each instruction set, and macOS's name.
_DARWIN_SETS = {
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "fphp": "hw.optional.arm.FEAT_FP16",
    "avx2": "hw.optional.avx2_0",
    "avx512f": "hw.optional.avx512f",
    "avx512_vnni": "hw.optional.avx512vnni",
}
_DARWIN_LARGE_CORES = "hw.perflevel0.physicalcpu"
_DARWIN_NAME = "machdep.cpu.brand_string"
# Windows' numbers, from winnt.h. It has none for VNNI.
_WINDOWS_SETS = {"avx2": 40, "avx512f": 41, "asimddp": 43}


def instruction_sets() -> frozenset[str]:
    """The instruction sets that the system reports; empty on systems other than macOS and Windows."""
    if sys.platform == "darwin":
        return frozenset(name for name, key in _DARWIN_SETS.items() if _number(key))
    if sys.platform == "win32":
        has = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return frozenset(name for name, number in _WINDOWS_SETS.items() if has(number))
    return frozenset()


def large_cores() -> int | None:
    """Number of fast physical cores, if macOS reports several kinds; None elsewhere."""
    return _number(_DARWIN_LARGE_CORES) or None if sys.platform == "darwin" else None


def processor_name() -> str:
    """The processor's name on macOS; empty elsewhere."""
    return (_sysctl(_DARWIN_NAME) or b"").rstrip(b"\0").decode("utf-8", "replace") if sys.platform == "darwin" else ""


def _number(key: str) -> int:
    """A number of sysctl, 0 if the name is unknown."""
    return int.from_bytes(_sysctl(key) or b"", sys.byteorder)


def _sysctl(key: str) -> bytes | None:
    """The raw value of `sysctl KEY`, None if the name is unknown."""
    ask = ctypes.CDLL(None).sysctlbyname
    name, size = key.encode(), ctypes.c_size_t(0)
    if ask(name, None, ctypes.byref(size), None, ctypes.c_size_t(0)) or not size.value:
        return None
    found = ctypes.create_string_buffer(size.value)
    return None if ask(name, found, ctypes.byref(size), None, ctypes.c_size_t(0)) else found.raw[: size.value]
