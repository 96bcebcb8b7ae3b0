"""Blocks on the disk: one file each, written to a temporary name and renamed, within a budget that processes share.

FOLDER/ab/abcdef....kv is a block, named by its key in hexadecimal; FOLDER/budget is a number of bytes. A file's
modification time is its last use. Later blocks of a text get earlier times, a millisecond each, so that the beginning
of a text is evicted last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import CacheCorruptError, CacheVersionError
from ...host.clock import CLOCK_SLACK_S, Clock
from ...host.files import TEMPORARY, InUseError, UnfitFileError, open_regular, read_bytes, remove, replacing
from ...host.home import make_private_folder
from ..amounts import LARGEST_AMOUNT
from .block_file import HEADER_BYTES, check_header, decode, encode
from .memory import Block

FOLDER_NAME = "prefixes"  # below EDGELM_HOME
_SUFFIX = ".kv"
_BUDGET_NAME = "budget"
_BUDGET_DIGITS = len(str(LARGEST_AMOUNT))
_NAME = re.compile(r"[0-9a-f]{64}\.kv", re.ASCII)
# How long writing backs off after a failure.
_REST_S = 60.0
# Longer than any write takes: an older temporary file was left by a process that was killed.
_ABANDONED_S = 3600.0
_DEPTH_S = 0.001
# The part of the budget that one eviction frees, and that a process may write before it lists the folder again.
_SLACK = 16
_PAGE_BYTES = 4096
_PART_LETTERS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundFile:
    """A block's file as a listing shows it. used: seconds since 1970; bytes: as file systems allocate them."""

    path: Path
    used: float
    bytes: int


class BlockFiles:
    """The files of a folder. Nothing is opened or created before the first use.

    Between threads: `read` from any, `put` from one at a time. Between processes: safe; files appear whole. Each
    process keeps to the budget by its own count, and lists the folder again after writing a sixteenth of the budget. A
    kill leaves a temporary file, which is deleted after an hour. Raises: nothing; a failure gives one warning, and
    writing backs off for a minute.
    """

    def __init__(self, folder: Path, max_bytes: int, clock: Clock | None = None) -> None:
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock or Clock()
        self._known: int | None = None  # bytes of all files when the folder was looked through
        self._unseen = 0  # bytes written since then
        self._rests_until = -float("inf")
        self._warned: set[object] = set()

    def read(self, key: bytes, size: int) -> Block | None:
        """The block of a key, checked, or None. size: in bytes. Cost: one read. A damaged file is deleted."""
        path = self._path(key)
        try:
            return decode(key, _read(path, size), size)
        except (FileNotFoundError, NotADirectoryError, CacheVersionError):
            return None
        except OSError as error:
            self._warn(error.errno, f"{path} cannot be read ({error})")
        except CacheCorruptError as error:
            self._warn("damage", f"{path} was damaged ({error}) and is deleted")
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def put(self, key: bytes, used: float, block: Block | None) -> None:
        """Store a block, or note its use if it is stored already. used: `time_of_use`; block: None only notes the use.

        Cost: one write, no fsync; now and then a listing of the folder.
        """
        if self._clock.monotonic() < self._rests_until:
            return
        path = self._path(key)
        try:
            if not self._used(path, used) and block is not None:
                self._write(path, used, encode(key, block), block)
        except OSError as error:
            self._rests_until = self._clock.monotonic() + _REST_S
            self._warn(error.errno, f"{self._folder} cannot be written ({error}): check its folder and disk")

    def trim(self) -> None:
        """Set the budget for all processes, and evict down to it. Raises: OSError. Cost: a listing."""
        self._make_room(0)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / (name + _SUFFIX)

    def _used(self, path: Path, used: float) -> bool:
        """Note a use. Return whether the file is there."""
        try:
            os.utime(path, (used, used))
        except FileNotFoundError:
            return False
        return True

    def _write(self, path: Path, used: float, header: bytes, block: Block) -> None:
        size = _allocated(len(header) + block.nbytes)
        if not self._make_room(size):
            return
        make_private_folder(path.parent)
        try:
            with replacing(path) as file:
                file.write(header)
                file.write(block.data)
        except InUseError:
            if not path.exists():
                raise
            # Another process reads it right now. It holds the same bytes, since the key is the same.
            return
        self._used(path, used)
        self._unseen += size

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used files until so many bytes more fit. Return whether they fit."""
        if self._known is not None and self._unseen + size <= self._room():
            return True
        now = self._clock.wall()
        self._agree_on_budget()
        _delete_abandoned(self._folder, now)
        found = sorted(found_files(self._folder), key=lambda file: _last_use(file, now))
        self._known, self._unseen = sum(file.bytes for file in found), 0
        if self._known + size > self._max_bytes:
            for file in found:
                if self._known + size <= self._max_bytes - self._max_bytes // _SLACK:
                    break
                self._known -= file.bytes if _delete(file.path) else 0
        return self._known + size <= self._max_bytes

    def _room(self) -> int:
        """Bytes that may be written before the folder is listed again."""
        assert self._known is not None, "the folder was looked through"
        return min(self._max_bytes - self._known, self._max_bytes // _SLACK)

    def _agree_on_budget(self) -> None:
        """Write this process's budget into the folder. It applies to all processes, which read it when they list the
        folder."""
        if self._known is not None:
            self._max_bytes = read_budget(self._folder) or self._max_bytes
        elif read_budget(self._folder) != self._max_bytes:
            make_private_folder(self._folder)
            with replacing(self._folder / _BUDGET_NAME) as file:
                file.write(str(self._max_bytes).encode("ascii"))

    def _warn(self, kind: object, message: str) -> None:
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        log.log(level, "the prefix cache: %s", message)


def time_of_use(now: float, depth: int) -> float:
    """The modification time that notes a use at `now`, in seconds since 1970. depth: blocks of its text before it."""
    return now - depth * _DEPTH_S


def found_files(folder: Path) -> Iterator[FoundFile]:
    """All blocks of a folder, including those of newer versions; none if there is no folder. Raises: OSError."""
    for entry in _entries(folder):
        if _NAME.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process evicted it
                status = entry.stat(follow_symlinks=False)
                yield FoundFile(Path(entry.path), status.st_mtime, _allocated(status.st_size))


def read_budget(folder: Path) -> int | None:
    """The budget in bytes that was written into a folder last; None if there is none. If it cannot be read: None, with
    a warning."""
    path = folder / _BUDGET_NAME
    try:
        text = read_bytes(path, _PAGE_BYTES).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): the default budget counts", path, error.strerror)
        return None
    # Limited digits and no sign: a truncated or negative number would evict all files.
    budget = int(text) if text.isdigit() and len(text) <= _BUDGET_DIGITS else 0
    if not 0 < budget <= LARGEST_AMOUNT:
        log.warning("%s holds no number of bytes: the default budget counts", path)
        return None
    return budget


def delete_all(folder: Path) -> None:
    """Delete all blocks and what killed processes left. Those of newer versions stay.

    Raises: OSError; CacheVersionError, if some stayed.
    """
    for entry in _entries(folder):
        if entry.name.endswith(TEMPORARY):
            remove(Path(entry.path))
    newer = [file.path for file in found_files(folder) if _is_newer(file.path)]
    for file in found_files(folder):
        if file.path not in newer:
            remove(file.path)
    if newer:
        raise CacheVersionError(
            f"{len(newer)} blocks in {folder} are of a newer edgelm and were left: use that one, or delete them"
        )


def check_all(folder: Path, max_bytes: int) -> None:
    """Read every block. Raises: CacheCorruptError for the first damaged block, or if the folder exceeds the budget by
    more than processes may write between two listings; CacheVersionError for one of a newer version; OSError."""
    total = 0
    for file in found_files(folder):
        total += file.bytes
        try:
            decode(bytes.fromhex(file.path.stem), _read(file.path, max_bytes))
        except FileNotFoundError:
            continue
        except CacheCorruptError as error:
            raise CacheCorruptError(f"{file.path} is damaged: {error}") from error
        except CacheVersionError as error:
            raise CacheVersionError(f"{file.path} is of a newer edgelm: {error}") from error
    if total > max_bytes + max_bytes // _SLACK * 2:
        raise CacheCorruptError(f"{folder} takes {total:,} bytes, its budget is {max_bytes:,}")


def _read(path: Path, size: int) -> bytes:
    """A file with a block of at most so many bytes. Raises: OSError; CacheCorruptError."""
    try:
        return read_bytes(path, HEADER_BYTES + size)
    except UnfitFileError as error:
        raise CacheCorruptError(str(error.strerror)) from error


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in the folders of a folder."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as parts:
        for part in parts:
            if len(part.name) == _PART_LETTERS and part.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError), os.scandir(part.path) as entries:
                    yield from entries


def _last_use(file: FoundFile, now: float) -> float:
    """The time of last use. A time in the future comes from a clock that was set back: such a file is evicted first."""
    return file.used if file.used <= now + CLOCK_SLACK_S else -float("inf")


def _delete(path: Path) -> bool:
    """Delete a file. Return whether it no longer counts towards the budget: deleted, or owned by a newer version."""
    try:
        if not _is_newer(path):
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _is_newer(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            check_header(file.read(HEADER_BYTES))
    except CacheVersionError:
        return True
    except (CacheCorruptError, FileNotFoundError):
        return False
    return False


def _delete_abandoned(folder: Path, now: float) -> None:
    for entry in _entries(folder):
        if entry.name.endswith(TEMPORARY):
            with contextlib.suppress(OSError):
                if not 0 <= now - entry.stat().st_mtime + CLOCK_SLACK_S < _ABANDONED_S:
                    Path(entry.path).unlink()


def _allocated(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
