"""How much memory is free, and an error with figures before it runs out, where the kernel would kill the process.

Reads the machine's memory and the process's version 2 control groups. Also returns freed memory to the system.
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
    """Free memory within the machine and the control groups, in bytes. File pages that can be dropped count as free.

    Cost: some files below /proc and /sys, 0.1 ms.
    """
    machine = int(psutil.virtual_memory().available)
    return min([machine, *(left for group in control_groups() if (left := _left(group)) is not None)])


def require_bytes(needed: int, purpose: str, remedy: str) -> None:
    """Raise MemoryShortageError if fewer bytes are free. purpose: what needs them; remedy: what the user can do."""
    available = available_bytes()
    if needed > available:
        raise MemoryShortageError(
            f"{purpose} takes {_mib(needed)} MiB of memory, and {_mib(available)} MiB are left: {remedy}"
        )


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros in pages of its own. The system allocates each page when it is first written to, and gets all
    back when the array is deleted. `np.zeros` may reuse freed heap memory: every page is then written, and the heap
    never shrinks.

    Cost: some 5 microseconds, and at most a page more than the array. Raises: MemoryShortageError.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        # Private: shared pages, mmap's default, would also be a forked child's.
        pages = mmap.mmap(-1, size) if sys.platform == "win32" else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    except OSError as error:
        raise MemoryShortageError(
            f"the system refuses {_mib(size)} MiB of memory ({error.strerror}): close other programs"
        ) from error
    return np.frombuffer(pages, dtype).reshape(shape)


def give_back() -> None:
    """Return freed memory to the system. glibc keeps it otherwise; other C libraries return it themselves.

    Parsing a tokenizer and a graph leaves some 25 MB. Cost: about 1 ms.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f}"


def control_groups() -> Iterator[Path]:
    """The folders of the process's control groups, innermost first; none on systems without them."""
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
    """Free bytes below a group's limit, or None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(pages.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
