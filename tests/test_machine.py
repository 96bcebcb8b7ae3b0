"""What the runtime knows about the machine: the threads it may use, and whether 8-bit products saturate."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgelm.runtime.errors import SessionError
from edgelm.runtime.host import cpuid, machine
from edgelm.runtime.host.ort import load_onnxruntime


@pytest.fixture(autouse=True)
def eight_free_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of 8 physical and 16 logical cores without limits, which tests then restrict."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "control_groups", lambda: [tmp_path / "a" / "b", tmp_path / "a", tmp_path])
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "cpu")
    monkeypatch.setattr(cpuid, "instruction_sets", lambda: None)


def test_threads_are_physical_cores() -> None:
    assert machine.default_threads() == 8


def test_logical_cores_stand_in_where_physical_ones_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4 if logical else None)
    assert machine.default_threads() == 4
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert machine.default_threads() == 1


@pytest.mark.parametrize(("allowed", "threads"), [({3}, 1), ({0, 5, 9}, 3), (set(range(16)), 8)])
def test_affinity_bounds_the_threads(monkeypatch: pytest.MonkeyPatch, allowed: set[int], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert machine.default_threads() == threads


def test_systems_without_affinity_use_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.default_threads() == 8


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("100000 50000\n", 2),
        ("9900000 100000\n", 8),
        ("", 8),
        ("nonsense\n", 8),
    ],
)
def test_the_containers_quota_bounds_the_threads(tmp_path: Path, quota: str, threads: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert machine.default_threads() == threads


@pytest.mark.parametrize(("inner", "outer", "threads"), [("max 100000", "300000 100000", 3), ("2 1", "5 1", 2)])
def test_the_quota_of_an_outer_group_counts(tmp_path: Path, inner: str, outer: str, threads: int) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text(inner)
    (tmp_path / "a" / "cpu.max").write_text(outer)
    assert machine.default_threads() == threads


def test_the_tightest_limit_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("500000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert machine.default_threads() == 3
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 2)
    assert machine.default_threads() == 2


# ---- saturating kernels

AVX2 = "fpu sse sse2 avx avx2 fma"
AVX512_WITHOUT_VNNI = AVX2 + " avx512f avx512bw avx512vl"


def cpuinfo(flags: str, cores: int = 2) -> str:
    core = f"processor\t: 0\nmodel name\t: some avx512_vnni CPU\nflags\t\t: {flags}\nvmx flags\t: vnmi\n"
    return "\n".join([core] * cores)


@pytest.mark.parametrize("name", ["x86_64", "AMD64", "amd64"])
@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        (AVX2, True),
        (AVX512_WITHOUT_VNNI, True),
        (AVX512_WITHOUT_VNNI + " avx512_vnni", False),
        (AVX2 + " avx_vnni", False),
        (AVX2 + " avx_vnni_int8", True),
        ("", True),
    ],
)
def test_x86_saturates_unless_it_has_vnni(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, flags: str, saturates: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    (tmp_path / "cpuinfo").write_text(cpuinfo(flags))
    assert machine.saturates_int8() is saturates


@pytest.mark.parametrize("text", [None, "", "processor: 0\n"])
def test_an_x86_without_known_flags_counts_as_saturating(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert machine.saturates_int8()


def test_cpuid_overrides_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under an emulator /proc/cpuinfo describes the host."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(cpuinfo(AVX512_WITHOUT_VNNI + " avx512_vnni"))
    monkeypatch.setattr(cpuid, "instruction_sets", lambda: frozenset({"avx2"}))
    assert machine.saturates_int8()
    assert machine.instruction_sets() == {"avx2"}
    monkeypatch.setattr(cpuid, "instruction_sets", lambda: frozenset({"avx2", "avx_vnni"}))
    assert not machine.saturates_int8()


@pytest.mark.parametrize("name", ["aarch64", "arm64", "armv7l"])
def test_arm_never_saturates(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert not machine.saturates_int8()


def test_resident_bytes_grow_with_allocated_memory() -> None:
    before = machine.resident_bytes()
    held = np.ones(64 * 2**20, np.uint8)
    assert machine.resident_bytes() - before > 48 * 2**20
    assert held.all()


@pytest.mark.parametrize(
    ("name", "speeds", "threads"),
    [
        ("cpu_capacity", [1024, 1024, 446, 446, 446, 446], 2),
        ("cpu_capacity", [1024, 780, 780, 230], 3),
        ("cpufreq/cpuinfo_max_freq", [5200000, 5000000, 5000000, 2800000, 2800000], 3),
        ("cpufreq/cpuinfo_max_freq", [1500000] * 4, 4),
    ],
)
def test_small_cores_get_no_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, speeds: list[int], threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(speeds))), raising=False)
    for core, speed in enumerate(speeds):
        file = tmp_path / "cpu" / f"cpu{core}" / name
        file.parent.mkdir(parents=True)
        file.write_text(f"{speed}\n")
    assert machine.default_threads() == threads


def test_on_a_32_bit_system_the_advice_is_a_64_bit_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for most, words in ((2**63 - 1, "pip install onnxruntime"), (2**31 - 1, "install the 64-bit system")):
        monkeypatch.setattr(sys, "maxsize", most)
        with pytest.raises(SessionError, match=words):
            load_onnxruntime()
