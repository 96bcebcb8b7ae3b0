"""The instruction sets of an x86 processor are those that Linux reports."""

from __future__ import annotations

import mmap
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.runtime.host import cpuid

# Registers eax, ebx, ecx, edx that CPUID returns on an Intel Haswell, Ice Lake and Alder Lake.
BASIC = (0, 0, 1 << 12 | 1 << 19 | 1 << 27 | 1 << 28 | 1 << 29, 0)
AVX512 = 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31
HASWELL = {(1, 0): BASIC, (7, 0): (0, 1 << 5, 0, 0)}
ICE_LAKE = {(1, 0): BASIC, (7, 0): (0, 1 << 5 | AVX512, 1 << 11, 0)}
ALDER_LAKE = {(1, 0): BASIC, (7, 0): (1, 1 << 5, 0, 0), (7, 1): (1 << 4, 0, 0, 0)}
SAVES_AVX, SAVES_AVX512 = 0b111, 0b1110_0111


def test_each_processor_generation_has_its_instruction_sets() -> None:
    haswell = {"sse4_1", "fma", "avx", "f16c", "avx2"}
    assert cpuid.sets_of(HASWELL, SAVES_AVX) == haswell
    assert cpuid.sets_of(ALDER_LAKE, SAVES_AVX) == haswell | {"avx_vnni"}
    avx512 = {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "avx512_vnni"}
    assert cpuid.sets_of(ICE_LAKE, SAVES_AVX512) == haswell | avx512


def test_sets_whose_registers_the_system_does_not_save_are_left_out() -> None:
    assert "avx512_vnni" not in cpuid.sets_of(ICE_LAKE, SAVES_AVX)
    assert cpuid.sets_of(ICE_LAKE, 0) == {"sse4_1"}
    assert cpuid.sets_of({}, SAVES_AVX512) == frozenset()


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64")
def test_this_processor_says_what_linux_says() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    linux = set(next(line for line in lines if line.startswith("flags")).split())
    told = cpuid.instruction_sets()
    if told is None:
        pytest.skip("this system forbids executable memory")
    assert told == linux & cpuid._SETS.keys()


@pytest.fixture
def unread() -> Iterator[None]:
    cpuid._read.cache_clear()
    yield
    cpuid._read.cache_clear()


@pytest.mark.usefixtures("unread")
def test_without_executable_memory_the_sets_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert cpuid.instruction_sets() is None


def test_other_processors_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpuid.instruction_sets() is None
