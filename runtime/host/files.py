"""Files: reading what should be a regular file of plausible size, text, writing by one rename, renaming on Windows.

A path below a cache folder may lead to anything: a FIFO, which would block forever, a device, or a sparse file of many
gigabytes, which would fill the memory. So the file's kind and size are checked before a byte is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
# Texts that belong to a model: manifests, configurations, tokenizers (the largest known has 35 MB).
MODEL_TEXT_BYTES = 1 << 28
_READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

# Windows' errors for a file that a program has open, or a folder with one in it: access denied, sharing violation, lock
# violation, mapped. Virus scanners and indexers open new files for a moment, so operations are retried.
_IN_USE = (5, 32, 33, 1224)
_PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2)


class UnfitFileError(OSError):
    """A file that exists but is not a regular file, is too large, or is not text. `strerror` says which."""


class NoTextError(UnfitFileError):
    """A file that holds no UTF-8 text."""


class InUseError(PermissionError):
    """Windows refused to rename, replace or delete a file or a folder: a program has it open, or another user owns
    it."""


@contextlib.contextmanager
def open_regular(path: Path, most_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Never blocks.

    Raises: OSError; UnfitFileError, where it is another kind of file, or has more than `most_bytes`.
    """
    with naming(path):
        descriptor = os.open(path, _READ_ONLY)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        _require_regular(os.fstat(file.fileno()), path, most_bytes)
        yield file


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the ValueError for an impossible name, such as one with a NUL, into an UnfitFileError."""
    try:
        yield
    except ValueError as error:
        raise UnfitFileError(errno.EINVAL, f"no file has such a name, {error}", str(path)) from error


def require_regular(path: Path, most_bytes: int | None = None) -> None:
    """The same check for a file that somebody else opens. Raises: OSError."""
    _require_regular(path.stat(), path, most_bytes)


def _require_regular(found: os.stat_result, path: Path, most_bytes: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise UnfitFileError(errno.EINVAL, "it is not a regular file", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        raise UnfitFileError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {most_bytes:,}", str(path))


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file. Raises: OSError, as `open_regular`."""
    with open_regular(path, most_bytes) as file:
        data = bytearray()
        # Do not trust the size that was found: another process may write to the file.
        while len(data) <= most_bytes and (chunk := file.read(most_bytes + 1 - len(data))):
            data += chunk
    if len(data) > most_bytes:
        raise UnfitFileError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return bytes(data)


def read_text(path: Path, most_bytes: int | None = None) -> str:
    """The text of a UTF-8 file, with line ends unchanged. most_bytes: the file must be regular and at most so large;
    None for files that a user names, which may be pipes.

    Raises: OSError; UnfitFileError, NoTextError.
    """
    with naming(path):
        data = path.read_bytes() if most_bytes is None else read_bytes(path, most_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        raise NoTextError(errno.EILSEQ, reason, str(path)) from error


def create(path: Path) -> BinaryIO:
    """A new file of mode 0600. Raises: OSError."""
    return os.fdopen(os.open(path, _WRITE_NEW, 0o600), "wb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file of mode 0600 that replaces `path` by one rename when the block ends without an error.

    Its name until then begins with a dot and ends with TEMPORARY; a kill leaves it there. Raises: OSError; InUseError,
    if a program has the old file open, which then stays.
    """
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with create(temporary) as file:
            yield file
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace(source: Path, target: Path) -> None:
    """Rename a file over another one. Raises: OSError; InUseError, after half a second of trying."""
    _try_again(lambda: source.replace(target), target)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder to an unused name. Raises: OSError; InUseError, after half a second of trying."""
    _try_again(lambda: source.rename(target), source)


def remove(path: Path) -> None:
    """Delete a file, if it exists. Raises: OSError; InUseError, after half a second of trying."""
    _try_again(lambda: path.unlink(missing_ok=True), path)


def _try_again(act: Callable[[], object], path: Path) -> None:
    for pause in (*_PAUSES_S, None):
        try:
            act()
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE:
                raise
            if pause is None:
                reason = "a program has it open, or it belongs to another user"
                raise InUseError(errno.EACCES, reason, str(path)) from error
            time.sleep(pause)
        else:
            return
