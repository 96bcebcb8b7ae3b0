"""This machine: the cores that may be used, its instruction sets, the memory in use."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path

import psutil

from . import asked, cpuid
from .memory import control_groups

_CPU_MAX = "cpu.max"
_CPU_INFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_SPEEDS = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")
# A core below this share of the fastest core's speed is a small core. Turbo frequencies of equal cores differ by some
# percent; Arm's middle cores have 0.6 to 0.8 of a large core's capacity, small cores 0.2 to 0.5.
_LARGE_SHARE = 0.6


def default_threads() -> int:
    """Threads to compute with: physical cores, limited by the process's affinity and the container's quota, without
    small cores if the processor has large ones.

    Hyper-threads share the units that matrix products keep busy, so two on one core only slow each other down. A matrix
    product is finished when its slowest part is, so a small core slows the large ones down.
    """
    limits = [psutil.cpu_count(logical=False) or psutil.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        limits += [len(allowed), len(_large_cores(allowed))]
    large = asked.large_cores()
    if large is not None:
        limits.append(large)
    quota = _cgroup_cpus()
    if quota is not None:
        limits.append(quota)
    return max(1, min(limits))


def _large_cores(cores: Collection[int]) -> Collection[int]:
    """The logical cores that are about as fast as the fastest one; all, if Linux does not report speeds."""
    speeds = {core: _speed(core) for core in cores}
    fastest = max(speeds.values(), default=0)
    return [core for core, speed in speeds.items() if speed >= _LARGE_SHARE * fastest]


def _speed(core: int) -> int:
    """A core's speed as the kernel reports it: its capacity on Arm, else its highest frequency; 0 if neither is
    known."""
    folder = _CPUS / f"cpu{core}"
    file = next((file for name in _SPEEDS if (file := folder / name).is_file()), None)
    return int(file.read_text()) if file is not None else 0


def _cgroup_cpus() -> int | None:
    """Whole CPUs that the process's version 2 control groups grant, or None without a limit."""
    return min((quota for group in control_groups() if (quota := _quota(group)) is not None), default=None)


def _quota(group: Path) -> int | None:
    try:
        quota, period = (group / _CPU_MAX).read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def saturates_int8() -> bool:
    """Whether onnxruntime's uint8 x int8 kernel may saturate its 16-bit sums here, giving wrong products.

    True on x86 without a VNNI instruction set (AVX2 multiplies pairs into 16 bits), and on x86 systems that do not
    report their instruction sets, where the safe kernel is the better guess. Arm kernels do not saturate. The
    instruction sets decide, never the processor's name.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not instruction_sets() & {"avx512_vnni", "avx_vnni"}


def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets, by Linux's names (flags on x86, features on Arm); empty if unknown.

    For the sets that decide about kernels, an x86 processor is asked directly where that is possible (`cpuid`).
    """
    told = cpuid.instruction_sets()
    if told is not None:
        return told
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return asked.instruction_sets()
    found = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.split())


def processor_name() -> str:
    """The processor's name as the system reports it, or its architecture."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    told = next((name for name in named if name), "") or asked.processor_name()
    return told or platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Physical memory that this process holds now, in bytes (shared file pages included)."""
    return int(psutil.Process().memory_info().rss)
