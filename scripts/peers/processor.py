"""The instruction sets that the system reports, and llama.cpp's build settings for them. Standard library only.

A compiler asked for native instructions looks only at the processor. In a virtual machine, the system may forbid
instructions that the processor has (AMX), and the program ends with SIGILL.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# llama.cpp's switches, and the flags of /proc/cpuinfo that each requires.
_X86 = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_F16C": ("f16c",),
    "GGML_FMA": ("fma",),
    "GGML_BMI2": ("bmi2",),
    "GGML_AVX2": ("avx2",),
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}
_ARM = {"asimddp": "dotprod", "fphp": "fp16", "i8mm": "i8mm", "sve": "sve"}


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """The instruction sets that the system lets programs use; empty if it does not report them."""
    if not cpuinfo.exists():
        return frozenset()
    lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    return frozenset(flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split())


def llama_cpp_settings(flags: Set[str]) -> list[str]:
    """Settings for CMake. Without flags, as on systems other than Linux, the compiler chooses."""
    if not flags:
        return ["-DGGML_NATIVE=ON"]
    if "asimd" in flags:
        extensions = [f"+{name}" for flag, name in _ARM.items() if flag in flags]
        return (
            ["-DGGML_NATIVE=OFF", f"-DGGML_CPU_ARM_ARCH=armv8.2-a{''.join(extensions)}"]
            if extensions
            else ["-DGGML_NATIVE=OFF"]
        )
    switches = [f"-D{name}={'ON' if set(needed) <= flags else 'OFF'}" for name, needed in _X86.items()]
    return ["-DGGML_NATIVE=OFF", *switches]
