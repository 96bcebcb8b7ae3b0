"""The instruction sets of an x86 processor, by its instructions CPUID and XGETBV.

/proc/cpuinfo may describe another processor than the one that computes: under an emulator it describes the host's.
onnxruntime chooses its kernels by CPUID, so this asks CPUID too. It works on 64-bit Linux, if a process may make memory
executable; elsewhere the result is None.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
import sys

# void cpuid(uint32_t registers[4], uint32_t leaf, uint32_t subleaf), by the calling convention of 64-bit Linux:
# push rbx; mov eax, esi; mov ecx, edx; cpuid; mov [rdi], eax; mov [rdi+4], ebx; mov [rdi+8], ecx; mov [rdi+12], edx;
# pop rbx; ret
_CPUID = bytes.fromhex("53 89f0 89d1 0fa2 8907 895f04 894f08 89570c 5b c3")
# The same for the register XCR0, which names the registers that the system saves: xor ecx, ecx; xgetbv; mov [rdi], eax;
# ret
_XGETBV = bytes.fromhex("31c9 0f01d0 8907 c3")

_EAX, _EBX, _ECX, _EDX = range(4)
_OSXSAVE = (1, 0, _ECX, 27)
_AVX_STATE, _AVX512_STATE = 0b110, 0b1110_0110
# Linux's name of each set: leaf, subleaf, register and bit that report it, and the bits of XCR0 that it needs.
_SETS = {
    "sse4_1": (1, 0, _ECX, 19, 0),
    "fma": (1, 0, _ECX, 12, _AVX_STATE),
    "avx": (1, 0, _ECX, 28, _AVX_STATE),
    "f16c": (1, 0, _ECX, 29, _AVX_STATE),
    "avx2": (7, 0, _EBX, 5, _AVX_STATE),
    "avx512f": (7, 0, _EBX, 16, _AVX512_STATE),
    "avx512dq": (7, 0, _EBX, 17, _AVX512_STATE),
    "avx512cd": (7, 0, _EBX, 28, _AVX512_STATE),
    "avx512bw": (7, 0, _EBX, 30, _AVX512_STATE),
    "avx512vl": (7, 0, _EBX, 31, _AVX512_STATE),
    "avx512_vnni": (7, 0, _ECX, 11, _AVX512_STATE),
    "avx512_fp16": (7, 0, _EDX, 23, _AVX512_STATE),
    "amx_bf16": (7, 0, _EDX, 22, 0b11 << 17),
    "amx_tile": (7, 0, _EDX, 24, 0b11 << 17),
    "amx_int8": (7, 0, _EDX, 25, 0b11 << 17),
    "avx_vnni": (7, 1, _EAX, 4, _AVX_STATE),
    "avx512_bf16": (7, 1, _EAX, 5, _AVX512_STATE),
    "avx_ifma": (7, 1, _EAX, 23, _AVX_STATE),
    "avx_vnni_int8": (7, 1, _EDX, 4, _AVX_STATE),
}


def instruction_sets() -> frozenset[str] | None:
    """The sets that matter to matrix products, by Linux's names, without those that the system does not support; None
    if the processor cannot be asked. Cost: some microseconds, once a process."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return None
    registers = _read()
    return None if registers is None else sets_of(*registers)


def sets_of(leaves: dict[tuple[int, int], tuple[int, ...]], saved: int) -> frozenset[str]:
    """The sets for given values of CPUID, {(leaf, subleaf): (eax, ebx, ecx, edx)}, and of XCR0 (`saved`)."""

    def told(leaf: int, subleaf: int, register: int, bit: int) -> bool:
        return bool(leaves.get((leaf, subleaf), (0, 0, 0, 0))[register] >> bit & 1)

    return frozenset(name for name, (*where, state) in _SETS.items() if told(*where) and saved & state == state)


@functools.cache
def _read() -> tuple[dict[tuple[int, int], tuple[int, ...]], int] | None:
    """The leaves of CPUID that `_SETS` needs, and XCR0 (0 where the system saves nothing)."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # a hardened system
        return None
    code.write(_CPUID + _XGETBV)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)

    def ask(offset: int, leaf: int = 0, subleaf: int = 0) -> tuple[int, ...]:
        registers = ctypes.create_string_buffer(16)
        call(address + offset)(ctypes.addressof(registers), leaf, subleaf)
        return struct.unpack("<4I", registers.raw)

    highest = ask(0)[_EAX]
    leaves = {(1, 0): ask(0, 1)}
    if highest >= 7:
        leaves[7, 0] = ask(0, 7)
        if leaves[7, 0][_EAX] >= 1:
            leaves[7, 1] = ask(0, 7, 1)
    leaf, subleaf, register, bit = _OSXSAVE
    saves = leaves[leaf, subleaf][register] >> bit & 1
    return leaves, ask(len(_CPUID))[_EAX] if saves else 0
