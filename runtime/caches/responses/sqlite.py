"""Answers on the disk, in one SQLite file that any number of threads and processes share.

A hit only reads. Uses are noted in memory and written with the next `put` or `close`, or when many wait. A killed
process loses only the recency of its last hits.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...errors import CacheCorruptError, CacheError
from ...host.clock import CLOCK_SLACK_S, Clock
from ...host.forks import watch_forks
from .answers import CachedAnswer, decode_answer, encode_answer
from .database import FILE_NAME, Database, DiskBudget, delete_database, mapped_errors
from .store import Policy, StoreStats
from .tables import budget_state, check_tables, cut_file, next_use, stats_of, write_budget

if TYPE_CHECKING:
    import sqlite3

_WAITING_USES = 256
# Extra pages that storing an answer nearly always stays below: page splits in a table and four indexes.
_MARGIN_PAGES = 8
# An answer larger than this part of the budget would evict too many others.
_LARGEST_PART = 4

_VICTIMS: dict[Policy, str] = {"lru": "used", "lfu": "uses, used"}

T = TypeVar("T")

# Connections that forked children inherited. SQLite allows a child neither to use nor to close them.
_inherited: list[Database] = []


class SqliteStore:
    """Answers in FOLDER/responses.sqlite, readable by its owner alone.

    Atomic: every method; `get` is one read, `put` one transaction. Between threads: safe, one at a time. Between
    processes: safe; readers never wait, writers wait for each other up to 2 s; a forked child opens its own connection.
    A `kill -9` at any moment loses no answer whose `put` returned; a power cut may lose the last ones. Budgets hold in
    the file, for all processes and after a restart; the last values that were set apply.
    Raises: CacheVersionError for the file of a newer edgelm, which stays untouched; CacheError, where the system
    refuses or another process holds the file for longer than 2 s. A damaged file is set aside with a warning in the
    log, and the method is done with a new one.
    """

    def __init__(
        self,
        folder: Path,
        budget: DiskBudget | None = None,
        *,
        ttl_s: float | None = None,
        policy: Policy = "lru",
        clock: Clock | None = None,
    ) -> None:
        """Nothing is opened before the first use. budget: None keeps the one that is in the file.

        ttl_s: seconds that an answer lives by the wall clock; None: for ever. If the clock is set back, answers from
        its future expire; if it is set forward, answers expire early.
        """
        self._folder, self._budget = folder, budget
        self._ttl_s, self._policy, self._clock = ttl_s, policy, clock or Clock()
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._budget_is_set = False
        self._waiting: dict[str, int] = {}
        watch_forks(self)

    def get(self, key: str) -> CachedAnswer | None:
        """The answer or None; counts a use. Cost: one indexed read; a small write at every 256th hit."""
        return self._run(lambda database: self._get(database, key))

    def touch(self, key: str) -> None:
        """Count a use without reading. Cost: a dictionary operation; a small write at every 256th use."""
        self._run(lambda database: self._note(database, key))

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer, and evict expired and old ones in the same transaction.

        An answer larger than a quarter of the byte budget is not stored. Cost: one write, and one for each evicted
        answer.
        """
        self._run(lambda database: self._put(database, key, answer))

    def clear(self) -> None:
        """Delete the database and those that were set aside. Works on a full disk. Cost: deleting a few files.

        Other processes notice at their next request and make a new one; their memory caches stay. Raises: CacheError,
        also on Windows while another process has the file open.
        """
        with self._lock, mapped_errors(self._folder / FILE_NAME):
            database, self._database = self._database, None
            self._waiting.clear()
            if database is not None:
                database.close()
            delete_database(self._folder)

    def stats(self) -> StoreStats:
        """Entries, bytes of the file, budgets. Cost: O(1)."""
        return self._run(stats_of, for_reading=True)

    def check(self) -> None:
        """Raises: CacheCorruptError, if SQLite finds damage, an entry is not what was written, the counters are wrong
        or a budget is exceeded. Cost: reads the whole file; writers wait. Nothing is changed or set aside."""
        with (
            self._lock,
            mapped_errors(self._folder / FILE_NAME),
            self._opened(rebuild=False, for_reading=True) as database,
            database.transaction() as connection,
        ):
            check_tables(database, connection)

    def close(self) -> None:
        """Write the uses that wait, and close the file. A later call opens it again."""
        with self._lock, mapped_errors(self._folder / FILE_NAME):
            database, self._database = self._database, None
            if database is None:
                return
            with contextlib.closing(database):
                if self._waiting and not database.moved():
                    self._write(database, lambda _: None)

    def after_fork(self) -> None:
        """Start a child without a connection, and without what another thread left half done."""
        self._lock = threading.Lock()
        self._waiting = {}
        if self._database is not None:
            _inherited.append(self._database)
            self._database = None

    # ---- the connection. From here on the lock is held.

    def _run(self, operation: Callable[[Database], T], *, for_reading: bool = False) -> T:
        """Run an operation. If it finds the database damaged, set that aside and run it on a new one."""
        with self._lock:
            try:
                with mapped_errors(self._folder / FILE_NAME), self._opened(for_reading=for_reading) as database:
                    return operation(database)
            except CacheCorruptError as error:
                damaged, self._database = self._database, None
                if damaged is not None:
                    damaged.set_aside(str(error))
            with mapped_errors(self._folder / FILE_NAME):
                return operation(self._current())

    @contextlib.contextmanager
    def _opened(self, *, rebuild: bool = True, for_reading: bool = False) -> Iterator[Database]:
        """The database for one operation. An exclusive one is closed behind it: other processes wait for its end."""
        database = self._current(rebuild=rebuild, for_reading=for_reading)
        try:
            yield database
        finally:
            if database.exclusive:
                self._database = None
                database.close()

    def _current(self, *, rebuild: bool = True, for_reading: bool = False) -> Database:
        """The open database; opened anew if its path leads to another file by now."""
        if self._database is not None and self._database.moved():
            self._database.close()
            self._database = None
        if self._database is None:
            self._database = Database(self._folder, rebuild=rebuild, for_reading=for_reading)
            self._budget_is_set = False
        if not self._budget_is_set:
            self._set_budget(self._database)
            self._budget_is_set = True
        return self._database

    def _set_budget(self, database: Database) -> None:
        """Lower a budget in small steps: a single transaction could fill the log with half of the file."""
        if self._budget is None:
            return
        wanted = (self._budget.max_entries, self._budget.max_bytes)
        while (budget := budget_state(database)[1:]) != wanted:
            now = stats_of(database)
            step = (max(wanted[0], now.entries * 9 // 10), max(wanted[1], now.bytes * 9 // 10))
            # The file may be unable to shrink further: a dozen pages are the minimum.
            self._write(database, functools.partial(write_budget, step=wanted if step == budget else step))

    # ---- what the methods do

    def _get(self, database: Database, key: str) -> CachedAnswer | None:
        row = database.connection.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        answer = decode_answer(key, row[0])
        if answer.expired(self._ttl_s, self._clock.wall()):
            return None
        self._note(database, key)
        return answer

    def _note(self, database: Database, key: str) -> None:
        """Remember a use; the last one moves to the end, so that the order of uses is kept."""
        self._waiting[key] = self._waiting.pop(key, 0) + 1
        if len(self._waiting) < _WAITING_USES:
            return
        try:
            with mapped_errors(database.path):
                self._write(database, lambda _: None)
        except CacheCorruptError:
            raise
        except CacheError:
            # A hit must not fail because its use cannot be noted: the disk may be full, or another process writing.
            self._waiting.clear()

    def _put(self, database: Database, key: str, answer: CachedAnswer) -> None:
        value = encode_answer(key, answer)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM answers WHERE key = ?", (key,))
            _, max_entries, max_bytes = budget_state(database)
            *_, page = database.pages()
            large = len(value) * _LARGEST_PART > max_bytes
            if large or max_entries < 1 or answer.expired(self._ttl_s, self._clock.wall()):
                return
            self._evict(database, 1, len(value) // page + _MARGIN_PAGES)
            connection.execute(
                "INSERT INTO answers (key, created, used, uses, value) VALUES (?, ?, ?, 1, ?)",
                (key, answer.created, next_use(connection), value),
            )

        self._write(database, insert)

    def _write(self, database: Database, change: Callable[[sqlite3.Connection], object]) -> None:
        """One transaction: write the noted uses, delete expired answers, make the change, evict down to the byte
        budget."""
        with database.transaction() as connection:
            used = next_use(connection)
            connection.executemany(
                "UPDATE answers SET used = ?, uses = uses + ? WHERE key = ?",
                [(used + index, uses, key) for index, (key, uses) in enumerate(self._waiting.items())],
            )
            if self._ttl_s is not None:
                now = self._clock.wall()
                connection.execute(
                    "DELETE FROM answers WHERE created <= ? OR created > ?", (now - self._ttl_s, now + CLOCK_SLACK_S)
                )
            change(connection)
            self._evict(database, 0, 0)
            cut_file(database)
        self._waiting.clear()

    def _evict(self, database: Database, more_entries: int, more_pages: int) -> None:
        """Evict until so many entries and pages more fit into the budgets, or nothing is left."""
        while True:
            entries, max_entries, max_bytes = budget_state(database)
            count, free, page = database.pages()
            excess = entries + more_entries - max_entries
            pages = count - free + more_pages - max_bytes // page
            if entries == 0 or (excess <= 0 and pages <= 0):
                return
            # Half of what the average entry suggests, so that large ones do not take too many others with them.
            victims = max(excess, pages * entries // (2 * count), 1)
            deleted = database.connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM answers ORDER BY "  # noqa: S608, from our own table
                f"{_VICTIMS[self._policy]} LIMIT ?)",
                (victims,),
            )
            if deleted.rowcount < 1:
                raise CacheCorruptError(f"{database.path} counts {entries} answers, and there is none")
