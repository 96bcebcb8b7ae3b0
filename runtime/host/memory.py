"""Memory that may still be taken, and refusals before it runs out: an error with figures, where the kernel would kill.

Knows the machine's memory and version 2 control groups, the process's own and those around it. And gives back what was
freed.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from ..errors import MemoryShortageError

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MIB = 1 << 20


def available_bytes() -> int:
    """What the machine and the control groups leave, in bytes; pages of files that can be dropped count as free.

    Cost: some files below /proc and /sys, 0.1 ms.
    """
    machine = int(psutil.virtual_memory().available)
    return min([machine, *(left for group in control_groups() if (left := _left(group)) is not None)])


def require_bytes(needed: int, purpose: str, remedy: str) -> None:
    """Raise MemoryShortageError if there are not this many bytes. purpose: what they are for; remedy: what helps."""
    available = available_bytes()
    if needed > available:
        raise MemoryShortageError(
            f"{purpose} takes {_mib(needed)} MiB of memory, and {_mib(available)} MiB are left: {remedy}"
        )


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros in pages of its own: the system gives each when something is written to it, and has them back
    as soon as the array is gone. numpy's would lie among what was freed before, be written whole, and stay there.

    Cost: some 5 microseconds, and at most a page more than the array. Raises: MemoryShortageError.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        # Shared pages, mmap's default, would be those of a forked process, too.
        pages = mmap.mmap(-1, size) if sys.platform == "win32" else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    except OSError as error:
        raise MemoryShortageError(
            f"the system refuses {_mib(size)} MiB of memory ({error.strerror}): close other programs"
        ) from error
    return np.frombuffer(pages, dtype).reshape(shape)


def give_back() -> None:
    """Hand freed memory back to the system, which glibc keeps for the process; other C libraries do so themselves.

    Parsing a tokenizer and a graph leaves some 25 MB. Cost: about 1 ms.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f}"


def control_groups() -> Iterator[Path]:
    """The folders of the process's control group and of those around it, inmost first; none where there are none."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return
    folder = _CGROUP_ROOT / own
    yield folder
    for parent in folder.parents:
        if parent.is_relative_to(_CGROUP_ROOT):
            yield parent


def _left(group: Path) -> int | None:
    """What a group's limit leaves, or None where it has none."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(pages.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
