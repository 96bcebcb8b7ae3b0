"""Write a folder atomically: all of it or nothing.

Everything is written into a scratch folder, hidden beside the output, the manifest last; then it is renamed to the
output. An interrupted export leaves at most the scratch folder, which is never taken for a bundle, and which the next
export to the same place removes. A lock shows whether its process is alive: process ids are reused, and differ between
containers that share a folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime.bundle.manifest import MANIFEST_NAME
from ...runtime.host.file_lock import lock_if_free
from ...runtime.host.files import InUseError, rename
from ..errors import OutputError

_PARTIAL = ".partial-"
_LOCK_NAME = "lock"
# The old output, while it is replaced on systems that cannot exchange two folders.
_REPLACED_NAME = "replaced"
# A younger scratch folder without a lock may just have been made.
_UNLOCKED_S = 60.0
# Linux's flag to exchange two names atomically.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(out: Path, force: bool, mark: str = MANIFEST_NAME) -> None:
    """Check before any work that the output may be written. mark: the file that identifies a folder of the kind that
    may be replaced. Raises: OutputError."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputError(f"{out} exists: choose another place with --out, or replace it with --force")
    if not (out / mark).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists and has no {mark}, so --force does not replace it: choose another place with --out"
        )


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """The scratch folder, hidden beside the output. It is removed with its contents at the end of the block in any
    case.

    Raises: OutputError, also for system errors inside the block (disk full, no permission).
    """
    folder = out.parent / f".{out.name}{_PARTIAL}{secrets.token_hex(8)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder.mkdir()
        with lock_if_free(folder / _LOCK_NAME):
            yield folder
    except OSError as error:
        raise _output_error(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a finished folder inside a `partial_folder` to the output. An existing bundle is exchanged with it. If the
    system cannot do that, the old bundle is moved aside first, so a mixture is never visible; after a kill in between,
    the next export moves it back. Raises: OSError."""
    for path in [*folder.iterdir(), folder]:
        _flush(path)
    if out.is_symlink() or not out.exists():
        rename(folder, out)
    elif not _exchange(folder, out):
        aside = folder.parent / _REPLACED_NAME
        rename(out, aside)
        try:
            rename(folder, out)
        except OSError:
            rename(aside, out)
            raise
    _flush(out.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders atomically. Returns False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # a C library from before 2018
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _remove_abandoned(out: Path) -> None:
    """Remove the scratch folders of dead exports to this place. An old bundle that such an export moved aside and did
    not replace is moved back."""
    name = re.compile(re.escape(f".{out.name}{_PARTIAL}") + "[0-9a-f]{16}")
    for path in out.parent.iterdir():
        if not name.fullmatch(path.name) or not _is_abandoned(path):
            continue
        if (path / _REPLACED_NAME).exists() and not out.exists():
            rename(path / _REPLACED_NAME, out)
        shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        if not (folder / _LOCK_NAME).exists():
            return time.time() - folder.stat().st_mtime > _UNLOCKED_S
        with lock_if_free(folder / _LOCK_NAME) as is_free:
            return is_free
    except OSError:  # removed meanwhile, or owned by another user
        return False


def _flush(path: Path) -> None:
    """Write a file or a folder through to the disk, before it is renamed."""
    if os.name == "nt":
        return  # Windows cannot open folders, and writes renames through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(out: Path, error: OSError) -> OutputError:
    if isinstance(error, InUseError):
        return OutputError(
            f"{out} cannot be replaced while a program has it open: close that, or choose another place with --out"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"no room to write {out} ({error.strerror}): free some space or choose another place with --out"
        )
    return OutputError(f"{out} cannot be written ({error}): choose another place with --out")
