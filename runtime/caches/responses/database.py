"""The SQLite file of the answers: opening, schema, versions, transactions, setting a damaged one aside.

`sqlite.py` has the queries. sqlite3 is imported late: some builds of Python come without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CacheCorruptError, CacheError, CacheVersionError
from ...host.file_lock import locked
from ...host.files import open_regular, remove, replace
from ...host.home import make_private_folder
from ...host.volumes import remote_volume

if TYPE_CHECKING:
    import sqlite3

SCHEMA_VERSION = 1
DEFAULT_DISK_BYTES = 256 * 2**20
DEFAULT_DISK_ENTRIES = 100_000
FOLDER_NAME = "responses"  # below EDGELM_HOME
FILE_NAME = "responses.sqlite"
# The order of deletion: the log before the file, since a new database must never find the log of an old one.
_PARTS = (f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", FILE_NAME)
_LOCK_NAME = "responses.lock"
_ASIDE = ".corrupt-"
_BUSY_S = 2.0
_LOG_BYTES = 4 * 2**20
# SQLite has error codes for damage, but not for missing tables, invalid text and a header out of range.
_DAMAGE = ("no such", "decode", "unsupported file format")
_NO_ROOM = "SQLITE_IOERR_SHMSIZE"  # the index of the write-ahead log cannot be made
_VERSION_OFFSET = 60  # of PRAGMA user_version in the file's header, 4 bytes, big-endian

# used: a number that grows with every use, so recency needs no clock. state.entries: kept by triggers, since counting
# rows reads them all. Budgets: the values that were set last, for all processes.
_SCHEMA = (
    "CREATE TABLE answers (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, created REAL NOT NULL,"
    " used INTEGER NOT NULL, uses INTEGER NOT NULL, value BLOB NOT NULL)",
    "CREATE INDEX by_recency ON answers (used)",
    "CREATE INDEX by_frequency ON answers (uses, used)",
    "CREATE INDEX by_age ON answers (created)",
    "CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), entries INTEGER NOT NULL,"
    " max_entries INTEGER NOT NULL, max_bytes INTEGER NOT NULL)",
    f"INSERT INTO state VALUES (1, 0, {DEFAULT_DISK_ENTRIES}, {DEFAULT_DISK_BYTES})",  # noqa: S608, our own numbers
    "CREATE TRIGGER one_more AFTER INSERT ON answers BEGIN UPDATE state SET entries = entries + 1; END",
    "CREATE TRIGGER one_less AFTER DELETE ON answers BEGIN UPDATE state SET entries = entries - 1; END",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiskBudget:
    """max_bytes: of the database file; the write-ahead log beside it takes about 4 MiB more. max_entries: answers."""

    max_bytes: int
    max_entries: int


class Database:
    """An open connection, and which file it is. Not safe between threads: `sqlite.SqliteStore` holds a lock."""

    def __init__(self, folder: Path, *, rebuild: bool = True, for_reading: bool = False) -> None:
        """Open the database of a folder; create it if needed.

        rebuild: set a damaged one aside; otherwise refuse it.
        for_reading: on a full disk, open it `exclusive` instead of failing. Close it after use.

        Raises: CacheVersionError, the file untouched; CacheCorruptError; CacheError, if the system refuses.
        """
        self.path = folder / FILE_NAME
        volume = remote_volume(folder)
        if volume is not None:
            raise CacheError(
                f"{folder} is on {volume}, where SQLite can neither lock nor share its files: set EDGELM_HOME to a "
                "folder on a disk of this machine"
            )
        with mapped_errors(self.path):
            make_private_folder(folder)
            with self._alone():
                try:
                    with mapped_errors(self.path):
                        self._open()
                except CacheCorruptError as error:
                    if not rebuild:
                        raise
                    self._rename_aside(str(error))
                    self._open()
                except CacheError as error:
                    if not for_reading or getattr(error.__cause__, "sqlite_errorname", "") != _NO_ROOM:
                        raise
                    self._open(exclusive=True)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """A lock between processes for creating, converting and setting aside a database. SQLite's own locks do not
        cover renaming, and a second conversion to the write-ahead log fails instead of waiting."""
        return locked(self.path.with_name(_LOCK_NAME), _BUSY_S)

    def _open(self, *, exclusive: bool = False) -> None:
        """exclusive: for reading alone, and until it is closed no other process can open the file. In exchange SQLite
        keeps the index of the write-ahead log in memory, where it otherwise needs a file of 32 KiB
        (https://sqlite.org/wal.html, section 8)."""
        import sqlite3

        # SQLite gives the files beside it the same mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o600))
        _refuse_newer(self.path)
        self._identity = _identity(self.path)
        self.exclusive = exclusive
        self.connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            if exclusive:
                self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            else:
                self._set_modes()
            self._check_schema()
        except BaseException:
            self.connection.close()
            raise

    def _set_modes(self) -> None:
        execute = self.connection.execute
        execute("PRAGMA auto_vacuum = INCREMENTAL")  # works only before the first table
        execute("PRAGMA journal_mode = WAL")  # no effect on file systems that cannot do it
        # A killed process loses nothing with NORMAL; a power cut may lose the last answers, and damages nothing.
        execute("PRAGMA synchronous = NORMAL")
        execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        execute("PRAGMA cell_size_check = ON")

    def _check_schema(self) -> None:
        """Make the tables in a new file. Raises: CacheCorruptError, if it is someone else's."""
        execute = self.connection.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version == 0 and not tables:
            with self.transaction():
                for statement in _SCHEMA:
                    execute(statement)
        elif version != SCHEMA_VERSION or not {"answers", "state"} <= tables:
            raise CacheCorruptError(f"{self.path} is a database, but not one of edgelm's answers")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Takes the right to write at once, waiting for other processes up to 2 s."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def pages(self) -> tuple[int, int, int]:
        """Pages of the file, free pages among them, bytes of a page; as this transaction sees them."""
        execute = self.connection.execute
        count, free, size = (
            execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return count, free, size

    def free_pages(self, most: int) -> None:
        """Shrink the file by at most so many free pages."""
        _, free, _ = self.pages()
        for _ in range(min(most, free)):
            # Python's sqlite3 runs one step of this statement, which is one page, whatever number is given.
            self.connection.execute("PRAGMA incremental_vacuum(1)")

    def moved(self) -> bool:
        """Whether the path no longer leads to the open file: deleted, replaced, or its disk is gone."""
        try:
            return _identity(self.path) != self._identity
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Free the file. The last process to do so empties the write-ahead log."""
        self.connection.close()

    def set_aside(self, reason: str) -> None:
        """Close, and rename the damaged file so that a new one is made, unless another process did so meanwhile."""
        import sqlite3

        with mapped_errors(self.path), self._alone():
            moved = self.moved()  # before closing: until then no other file can get this inode
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            if not moved:
                self._rename_aside(reason)

    def _rename_aside(self, reason: str) -> None:
        """One damaged copy is kept, the latest."""
        _delete_set_aside(self.path.parent)
        kept = self.path.with_name(f"{FILE_NAME}{_ASIDE}{int(time.time())}")
        for name in _PARTS:
            part = self.path.with_name(name)
            if part.exists():
                replace(part, kept.with_name(name.replace(FILE_NAME, kept.name)))
        log.warning("the response cache was damaged (%s): it is now %s, and a new one is used", reason, kept)


def delete_database(folder: Path) -> None:
    """Delete the database of a folder, and those that were set aside. Open connections must check `moved`.

    Raises: OSError; CacheVersionError, nothing deleted.
    """
    path = folder / FILE_NAME
    if not folder.exists():
        return
    with locked(folder / _LOCK_NAME, _BUSY_S):
        if path.exists():
            _refuse_newer(path)
        for name in _PARTS:
            remove(path.with_name(name))
        _delete_set_aside(folder)


def _delete_set_aside(folder: Path) -> None:
    for old in folder.glob(f"{FILE_NAME}{_ASIDE}*"):
        remove(old)


@contextlib.contextmanager
def mapped_errors(path: Path) -> Iterator[None]:
    """Map errors of sqlite3 and of the system to CacheError, and those that mean damage to CacheCorruptError."""
    try:
        import sqlite3
    except ImportError as error:
        raise CacheError(f"this Python was built without sqlite3, so {path} cannot be used: install it") from error
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.InterfaceError, sqlite3.ProgrammingError) as error:
        if any(words in str(error) for words in _DAMAGE):
            raise CacheCorruptError(f"{path} is damaged ({error})") from error
        raise CacheError(f"{path} cannot be used ({error}): check its folder and disk") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter when a message quotes damaged text
        raise CacheCorruptError(f"{path} is damaged ({error})") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be used ({error}): check its folder and disk") from error
    except MemoryError as error:
        raise CacheError(f"{path} cannot be used: there is not enough memory") from error


def _refuse_newer(path: Path) -> None:
    """Read the version before SQLite touches the file. Raises: CacheVersionError."""
    with open_regular(path) as file:
        head = file.read(_VERSION_OFFSET + 4)
    if head.startswith(b"SQLite format 3\0"):
        version = int.from_bytes(head[_VERSION_OFFSET:], "big")
        if version > SCHEMA_VERSION:
            raise CacheVersionError(
                f"{path} has version {version}, this edgelm knows {SCHEMA_VERSION}: use the newer edgelm, or delete it"
            )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
