"""What `edgelm cache` shows, clears and checks: the kinds of caches below EDGELM_HOME.

A further kind is a class with the methods of `CacheKind` and an entry in `cache_kinds`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import CacheError
from ..sessions import prepared
from .budgets import default_budgets
from .prefixes import files
from .prefixes.settings import PrefixCacheSettings
from .responses.database import FILE_NAME, FOLDER_NAME, DiskBudget
from .responses.settings import ResponseCacheSettings
from .responses.sqlite import SqliteStore
from .responses.store import StoreStats


class CacheKind(Protocol):
    """One kind of cache on this machine. No method makes a file; all raise CacheError."""

    name: str
    path: Path

    def stats(self) -> StoreStats:
        """Numbers of this moment, and the budgets."""

    def clear(self) -> None:
        """Forget everything."""

    def check(self) -> None:
        """Raise CacheCorruptError if it is damaged or beyond its budgets."""


class ResponseKind:
    """The database of answers; it stores its own budgets."""

    name = "responses"

    def __init__(self, home: Path) -> None:
        self.path = home / FOLDER_NAME / FILE_NAME

    def stats(self) -> StoreStats:
        """As `SqliteStore.stats`; before there is a database, the budgets that it will get."""
        if not self.path.exists():
            usual = default_budgets().responses
            return StoreStats(0, 0, usual.disk_entries, usual.disk_bytes)
        with contextlib.closing(SqliteStore(self.path.parent)) as store:
            return store.stats()

    def clear(self) -> None:
        """As `SqliteStore.clear`, set aside ones included."""
        SqliteStore(self.path.parent).clear()

    def check(self) -> None:
        """As `SqliteStore.check`."""
        if self.path.exists():
            with contextlib.closing(SqliteStore(self.path.parent)) as store:
                store.check()

    def limit(self, settings: ResponseCacheSettings) -> None:
        """Set the budgets for all processes and evict what is beyond them. Raises: CacheError."""
        if self.path.exists() and settings.disk:
            budget = DiskBudget(settings.disk_bytes, settings.disk_entries)
            with contextlib.closing(SqliteStore(self.path.parent, budget, policy=settings.policy)) as store:
                store.stats()


class PreparedKind:
    """Bundles prepared for this machine (`edgelm.runtime.sessions.prepared`)."""

    name = "prepared"

    def __init__(self, home: Path) -> None:
        self.path = home / prepared.FOLDER_NAME

    def stats(self) -> StoreStats:
        """An entry is a bundle."""
        folders = prepared.folders(self.path)
        size = sum(prepared.folder_bytes(folder) for folder in folders)
        return StoreStats(len(folders), size, None, prepared.DEFAULT_BUDGET_BYTES)

    def clear(self) -> None:
        """Delete all; a process that has one mapped keeps using it. Raises: CacheError on Windows, which deletes no
        mapped file."""
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
        except OSError as error:
            raise CacheError(
                f"{self.path} cannot be deleted ({error.strerror}): close the programs that have a model of it loaded"
            ) from error

    def check(self) -> None:
        """Compare every file with its checksum. Cost: reads them all."""
        for folder in prepared.folders(self.path):
            prepared.check_folder(folder)


class PrefixKind:
    """The prefix cache's files; their folder stores the budget."""

    name = "prefixes"

    def __init__(self, home: Path) -> None:
        self.path = home / files.FOLDER_NAME

    def stats(self) -> StoreStats:
        """Blocks, and bytes as the file system allocates them."""
        with self._mapped_errors():
            sizes = [file.bytes for file in files.found_files(self.path)]
        return StoreStats(len(sizes), sum(sizes), None, self._budget())

    def clear(self) -> None:
        """As `files.delete_all`."""
        with self._mapped_errors():
            files.delete_all(self.path)

    def check(self) -> None:
        """As `files.check_all`."""
        with self._mapped_errors():
            files.check_all(self.path, self._budget())

    def limit(self, settings: PrefixCacheSettings) -> None:
        """Set the budget for all processes and delete what is beyond it. Raises: CacheError."""
        with self._mapped_errors():
            if self.path.exists() and settings.disk:
                files.BlockFiles(self.path, settings.disk_bytes).trim()

    def _budget(self) -> int:
        return files.read_budget(self.path) or default_budgets().prefixes.disk_bytes

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(f"{self.path} cannot be used ({error}): check its folder and disk") from error


def cache_kinds(home: Path) -> tuple[CacheKind, ...]:
    """All kinds, in the order in which they are shown. home: what `edgelm.runtime.host.home.home()` gave."""
    return ResponseKind(home), PrefixKind(home), PreparedKind(home)
