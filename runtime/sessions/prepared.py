"""The prepared form of a model: weights in the order of onnxruntime's kernels for this machine, kept in files.

onnxruntime maps such a file instead of making a copy of all matrices. This saves private memory (the system may drop
the pages, and processes share them) and time at the start (docs/caching.md has the figures).

`EDGELM_HOME/prepared/KEY/` holds the optimized graph, its weights and `checks.json` with their sizes and CRC-32. KEY is
a digest of the bundle's digest and of whatever decides what onnxruntime makes: its version, the processor, this format.
A folder is made under a temporary name and renamed, so it is whole or not there; a damaged one is dropped and made
anew. Several processes may make, use and drop the same folder at once: files that are mapped outlive their names. On
Windows, which deletes no file that is mapped, what remains of a dropped folder goes when one is made the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..bundle.folder import GRAPH_NAME, WEIGHTS_NAME
from ..errors import CacheCorruptError, CacheError
from ..host import files, machine
from ..host.home import home, make_private_folder, nearest_existing, own_folder
from ..host.ort import load_onnxruntime
from . import numerics

log = logging.getLogger(__name__)

FOLDER_NAME = "prepared"
DEFAULT_BUDGET_BYTES = 8 << 30
_FORMAT = "edgelm-prepared-1"
_MAKING = "making-"
_CHECKS_NAME = "checks.json"
_CHECKS_BYTES = 1 << 16
_FILES = (GRAPH_NAME, WEIGHTS_NAME)
_CHUNK_BYTES = 1 << 18
# Smaller weights load fast anyway, and their copy costs little.
_LEAST_WEIGHTS_BYTES = 16 << 20
_STALE_S = 24 * 3600.0
# Required free disk space as a multiple of the weights. The file holds them twice, in the bundle's order and in the
# kernels'.
_NEEDED_SHARE = 4


class Prepared:
    """The prepared form of one bundle on this machine, whether or not it exists. Safe between threads and processes."""

    def __init__(self, bundle_digest: str, root: Path, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        """root: the folder of all prepared bundles, which need not exist."""
        self._root = root
        self._budget = budget_bytes
        key = "\n".join([_FORMAT, bundle_digest, numerics.of_machine()])
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]

    @property
    def graph(self) -> Path:
        """The path of the optimized graph."""
        return self.folder / GRAPH_NAME

    def is_there(self) -> bool:
        """Whether it exists, with the noted sizes. Marks it as used now."""
        try:
            noted = _read_checks(self.folder)
            there = all((self.folder / name).stat().st_size == noted[name][0] for name in _FILES)
        except (OSError, CacheCorruptError):
            return False
        with contextlib.suppress(OSError):  # the mark only serves eviction
            os.utime(self.folder)
        return there

    def check(self) -> None:
        """Compare the files with their noted CRC-32. Cost: one read of them. Raises: CacheCorruptError."""
        check_folder(self.folder)

    def drop(self) -> None:
        """Delete it."""
        _drop(self.folder)

    def is_worth_it(self, weights_bytes: int) -> bool:
        """Whether a prepared form of so many bytes of weights is useful, and fits into the budget and on the disk."""
        if weights_bytes < _LEAST_WEIGHTS_BYTES:
            return False
        try:
            free = shutil.disk_usage(nearest_existing(self._root)).free
        except OSError:
            return False
        return 2 * weights_bytes <= self._budget and _NEEDED_SHARE * weights_bytes <= free

    @contextlib.contextmanager
    def making(self) -> Iterator[Path]:
        """A temporary folder to write the two files to. It is renamed when the block ends without an error. Raises:
        OSError, if the folder cannot be made or filled."""
        make_private_folder(self._root)
        with tempfile.TemporaryDirectory(prefix=_MAKING, dir=self._root, ignore_cleanup_errors=True) as name:
            scratch = Path(name) / "files"
            scratch.mkdir(mode=0o700)
            yield scratch
            noted = {file: [(scratch / file).stat().st_size, _crc(scratch / file)] for file in _FILES}
            (scratch / _CHECKS_NAME).write_text(json.dumps(noted), encoding="utf-8")
            self.drop()  # an existing one is damaged
            with contextlib.suppress(OSError):  # another process made the same one first
                files.rename(scratch, self.folder)
        self._prune()

    def _prune(self) -> None:
        """Evict the least recently used ones down to the budget, but not this one. Also delete unfinished ones, and
        ones that could not be deleted earlier because they were mapped."""
        for folder in self._root.iterdir():
            made = (folder / _CHECKS_NAME).is_file()
            if not made and not (folder.name.startswith(_MAKING) and _is_recent(folder)):
                shutil.rmtree(folder, ignore_errors=True)
        found = sorted(folders(self._root), key=lambda folder: folder.stat().st_mtime, reverse=True)
        total = 0
        for folder in found:
            total += folder_bytes(folder)
            if total > self._budget and folder != self.folder:
                _drop(folder)


def prepared_for(bundle_digest: str, asked: bool = True) -> Prepared | None:
    """The prepared form of a bundle, or None if this machine can have none: on processors for which onnxruntime
    converts weights at load, and without a home folder. asked: warn about the latter."""
    if machine.saturates_int8():
        return None
    load_onnxruntime()  # its version is part of the key
    try:
        return Prepared(bundle_digest, own_folder(home() / FOLDER_NAME))
    except CacheError as error:
        log.log(logging.WARNING if asked else logging.DEBUG, "prepared weights are not used: %s", error)
        return None


def folders(root: Path) -> list[Path]:
    """The folders of all finished prepared forms, in no order."""
    return [folder for folder in root.glob("*") if (folder / _CHECKS_NAME).is_file()]


def _drop(folder: Path) -> None:
    """Delete a prepared form, the checks first: without them the rest is never used."""
    with contextlib.suppress(OSError):
        (folder / _CHECKS_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_recent(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime <= _STALE_S
    except OSError:  # renamed or removed meanwhile
        return True


def folder_bytes(folder: Path) -> int:
    """The size of a prepared form, 0 if it is gone."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def check_folder(folder: Path) -> None:
    """Compare a prepared form with its checks. Raises: CacheCorruptError."""
    for name, (size, crc) in _read_checks(folder).items():
        try:
            same = (folder / name).stat().st_size == size and _crc(folder / name) == crc
        except OSError as error:
            raise CacheCorruptError(f"{folder / name} cannot be read ({error.strerror}): delete {folder}") from error
        if not same:
            raise CacheCorruptError(f"{folder / name} is damaged: delete {folder}")


def _read_checks(folder: Path) -> dict[str, tuple[int, int]]:
    try:
        noted = json.loads(files.read_text(folder / _CHECKS_NAME, _CHECKS_BYTES))
        return {name: (int(noted[name][0]), int(noted[name][1])) for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise CacheCorruptError(f"{folder / _CHECKS_NAME} cannot be read: delete {folder}") from error


def _crc(file: Path) -> int:
    """CRC-32, which small boards compute faster than they read. It finds damage, not malice."""
    crc = 0
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with files.open_regular(file) as stream:
        while count := stream.readinto(chunk):  # type: ignore[attr-defined]
            crc = zlib.crc32(chunk[:count], crc)
    return crc
