"""Put a folder into place: all of it or nothing.

Everything is written into a hidden folder beside the output, the manifest last; then one rename makes it the output.
An export that is interrupted leaves at most that hidden folder, which no part of edgelm takes for a bundle and the next
export to the same place removes. Whose process still lives is told by a lock: process numbers are reused, and those of
containers that share a folder mean nothing to each other.
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
# What stood at the output, while it is replaced where two folders cannot be exchanged.
_REPLACED_NAME = "replaced"
# A folder without a lock is one that was made a moment ago, or of an edgelm that made none.
_UNLOCKED_S = 60.0
# Of Linux, to exchange two names at once.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(out: Path, force: bool, mark: str = MANIFEST_NAME) -> None:
    """Before any work: may a folder be written here? mark: the file by which one of its kind is known, the only kind
    that is replaced. Raises: OutputError."""
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
    """A hidden folder beside the output, removed with all that is in it when the block ends, however it ends.

    Raises: OutputError, also for what the system says about writing inside the block (disk full, no permission).
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
    """Rename a finished folder, which stands in a `partial_folder`, to the output. A bundle that stands there is
    exchanged with it; where the system cannot do that, it is moved aside first, so that at no time a mixture of the two
    can be seen, and put back by the next export where a kill came between. Raises: OSError."""
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
    """Give two folders each other's name in one step. False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # a C library of before 2018
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _remove_abandoned(out: Path) -> None:
    """Remove the hidden folders of exports to this place whose process is gone; what such a process had moved aside and
    not replaced goes back to its place."""
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
    except OSError:  # it was removed meanwhile, or belongs to somebody else
        return False


def _flush(path: Path) -> None:
    """Make sure that a file or a folder is on the disk before its name is."""
    if os.name == "nt":
        return  # folders cannot be opened there, and a rename is written through
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
