"""What `edgelm doctor` finds: which target fits this machine, what will be fast, and what is missing."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import CacheError, SessionError
from ..host import board, machine
from ..host.home import home, nearest_existing
from ..host.memory import available_bytes
from ..host.ort import load_onnxruntime
from ..sessions import kernels
from ..sessions.providers import CUDA, gpu_names

_ARM = ("aarch64", "arm64")
_X86 = ("x86_64", "amd64")
# The instruction sets that decide how fast 8-bit products are, as Linux names them.
_TELLING_SETS = ("avx2", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")


@dataclass(frozen=True)
class Diagnosis:
    """Facts, and `advice`: sentences about what could be better, most important first.

    board: the name in its device tree, None if there is none; page_bytes: size of a memory page; target: the profile to
    export with; threads: what `load` uses; int8: how fast 8-bit products are, in words; kernels: the compiled kernels
    that are used, or None; kernels_fault, onnxruntime_fault: why the installed kernels, or onnxruntime, cannot be used,
    which stops every model; extras: {name: whether all its packages are installed}; home: the folder of the caches,
    None without a home.
    """

    system: str
    board: str | None
    page_bytes: int
    processor: str
    threads: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    target: str | None
    int8: str
    kernels: str | None
    kernels_fault: str | None
    onnxruntime_fault: str | None
    versions: dict[str, str]
    providers: tuple[str, ...]
    extras: dict[str, bool]
    home: str | None
    home_free_bytes: int | None
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at the machine and the installation. Cost: the import of onnxruntime."""
    onnxruntime, onnxruntime_fault = _onnxruntime()
    providers = () if onnxruntime is None else tuple(onnxruntime.get_available_providers())
    sets = tuple(name for name in _TELLING_SETS if name in machine.instruction_sets())
    folder, problem = _home()
    used, fault = _kernels()
    extras = _extras()
    target = _target(providers)
    free = _free_bytes(folder)
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        board=board.name(),
        page_bytes=mmap.PAGESIZE,
        processor=machine.processor_name(),
        threads=machine.default_threads(),
        instruction_sets=sets,
        memory_bytes=int(psutil.virtual_memory().total),
        available_bytes=available_bytes(),
        target=target,
        int8=_int8_speed(sets),
        kernels=used,
        kernels_fault=fault,
        onnxruntime_fault=onnxruntime_fault,
        versions={
            "python": platform.python_version(),
            "edgelm": importlib.metadata.version("edgelm"),
            "onnxruntime": "none" if onnxruntime is None else str(onnxruntime.__version__),
        },
        providers=providers,
        extras=extras,
        home=None if folder is None else str(folder),
        home_free_bytes=free,
        advice=(*board.slowed(), *_advice(target, problem, extras)),
    )


def _onnxruntime() -> tuple[Any, str | None]:
    """The module, or None and why it cannot be loaded."""
    try:
        return load_onnxruntime(), None
    except SessionError as error:
        return None, str(error)


def _target(providers: tuple[str, ...]) -> str | None:
    if CUDA in providers and _has_gpu():
        return "cuda"
    kind = platform.machine().lower()
    return "arm-cpu" if kind in _ARM else "x86-cpu" if kind in _X86 else None


def _has_gpu() -> bool:
    """Whether there is a GPU: onnxruntime-gpu lists its provider also on machines without one."""
    return shutil.which("nvidia-smi") is not None or bool(gpu_names())


def _int8_speed(sets: tuple[str, ...]) -> str:
    kind = platform.machine().lower()
    if kind in _X86:
        fast = {"avx512_vnni", "avx_vnni"} & set(sets)
        return (
            "fast (VNNI)" if fast else "slower (no VNNI: weights become unsigned at load, so that sums cannot overflow)"
        )
    if kind in _ARM and not machine.instruction_sets():
        return "unknown (the system does not report its instruction sets)"
    if kind in _ARM:
        return "fast (dot product)" if "asimddp" in sets else "slower (no dot product instructions)"
    return "unknown"


def _kernels() -> tuple[str | None, str | None]:
    """The compiled kernels that are used, and what is wrong with them."""
    try:
        return kernels.identity(), None
    except SessionError as error:
        return None, str(error)


def _home() -> tuple[Path | None, str | None]:
    """The caches' folder, and what is wrong with it."""
    try:
        folder = home()
    except CacheError as error:
        return None, str(error)
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return folder, f"{nearest} cannot be written, so nothing is kept between runs: set EDGELM_HOME"
    return folder, None


def _free_bytes(folder: Path | None) -> int | None:
    """Free bytes on the disk of a folder, or None if unknown."""
    if folder is None:
        return None
    try:
        return shutil.disk_usage(nearest_existing(folder)).free
    except OSError:
        return None


def _extras() -> dict[str, bool]:
    """Whether the packages of each extra are installed; empty in a frozen program, to which nothing can be added."""
    found: dict[str, bool] = {}
    if getattr(sys, "frozen", False):
        return found
    for requirement in importlib.metadata.requires("edgelm") or []:
        match = re.match(r"([\w.-]+)[^;]*;.*extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match is not None and match.group(1) != "edgelm" and "python_version" not in requirement:
            found[match.group(2)] = found.get(match.group(2), True) and _is_installed(match.group(1))
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _advice(target: str | None, home_problem: str | None, extras: dict[str, Any]) -> list[str]:
    found = []
    if target is None:
        found.append(f"no target is made for {platform.machine()}: a bundle for x86-cpu may run, slowly")
    if target != "cuda" and _has_gpu():
        found.append("there is an NVIDIA driver: onnxruntime-gpu in place of onnxruntime would use the GPU")
    if target is not None and not kernels.are_installed():
        found.append(
            "there are no compiled kernels, with which INT8 models are faster: install the wheel of edgelm-kernels for "
            "this system, or, from a copy of the repository and with a C++ compiler,  pip install ./kernels"
        )
    if home_problem is not None:
        found.append(home_problem)
    if not extras.get("export", True):
        found.append('models cannot be exported here: pip install "edgelm[export]" on a workstation')
    return found
