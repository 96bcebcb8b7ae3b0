"""The tables of an open database of answers: counters, budgets, and the check of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import CacheCorruptError
from .answers import decode_answer
from .database import Database
from .store import StoreStats

if TYPE_CHECKING:
    import sqlite3

# A larger counter means damage. Below this, additions cannot overflow SQLite's integers.
_LARGEST_NUMBER = 2**60


def budget_state(database: Database) -> tuple[int, int, int]:
    """Entries, most entries, most bytes. Raises: CacheCorruptError for what cannot be true."""
    row = database.connection.execute("SELECT entries, max_entries, max_bytes FROM state").fetchone()
    # Budgets may be as large as SQLite's integers: nothing is added to them.
    if row is None or not all(type(value) is int and value >= 0 for value in row) or row[0] >= _LARGEST_NUMBER:
        raise CacheCorruptError(f"the counters of {database.path} are damaged")
    return row[0], row[1], row[2]


def write_budget(connection: sqlite3.Connection, step: tuple[int, int]) -> None:
    connection.execute("UPDATE state SET max_entries = ?, max_bytes = ?", step)


def next_use(connection: sqlite3.Connection) -> int:
    last = connection.execute("SELECT max(used) FROM answers").fetchone()[0]
    if last is None:
        return 0
    if type(last) is not int or not 0 <= last < _LARGEST_NUMBER:
        raise CacheCorruptError("the order of the uses is damaged")
    return last + 1


def cut_file(database: Database) -> None:
    """Shrink the file while it is larger than its budget. This moves pages, so it is done only when needed."""
    count, _, page = database.pages()
    database.free_pages(count - budget_state(database)[2] // page)


def stats_of(database: Database) -> StoreStats:
    entries, max_entries, max_bytes = budget_state(database)
    count, _, page = database.pages()
    return StoreStats(entries, count * page, max_entries, max_bytes)


def check_tables(database: Database, connection: sqlite3.Connection) -> None:
    problems = [text for (text,) in connection.execute("PRAGMA integrity_check(1)") if text != "ok"]
    if problems:
        raise CacheCorruptError(f"SQLite finds {database.path} damaged: {problems[0]}")
    stats = stats_of(database)
    (counted,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    if counted != stats.entries:
        raise CacheCorruptError(f"{database.path} holds {counted} answers, its counter says {stats.entries}")
    if counted > (stats.max_entries or 0) or stats.bytes > (stats.max_bytes or 0):
        raise CacheCorruptError(f"{database.path} is beyond its budgets: {stats}")
    for key, created, value in connection.execute("SELECT key, created, value FROM answers"):
        if decode_answer(key, value).created != created:
            raise CacheCorruptError(f"the time of the entry {key} is wrong")
