"""Answers on disk under failures: several processes, forks, kills, full and vanished disks, damaged files."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.runtime.caches.responses import database
from edgelm.runtime.caches.responses.answers import CachedAnswer, encode_answer
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.caches.responses.database import DiskBudget, mapped_errors
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.errors import CacheCorruptError, CacheError, CacheVersionError

from .conftest import ROOT, on_a_small_disk

BUDGET = DiskBudget(2**20, 1_000)
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither modes nor forks")


def answer(number: int, words: int = 5) -> CachedAnswer:
    return CachedAnswer(tuple((f"w{number} ", (number, index)) for index in range(words)), "stop")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "responses"


@pytest.fixture
def store(folder: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(folder, BUDGET)
    yield made
    made.close()


def fill(store: SqliteStore, count: int) -> None:
    for number in range(count):
        store.put(f"key {number}", answer(number))


def file_of(folder: Path) -> Path:
    return folder / "responses.sqlite"


# ---- what is on the disk


@posix
def test_only_the_owner_can_read_it(store: SqliteStore, folder: Path) -> None:
    before = os.umask(0)
    try:
        fill(store, 3)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}


def test_the_file_never_outgrows_its_budget_and_shrinks_with_it(folder: Path) -> None:
    source = random.Random(1)  # noqa: S311
    store = SqliteStore(folder, BUDGET)
    for number in range(600):
        store.put(f"key {number}", answer(number, source.choice((1, 30, 300, 3000))))
        if number % 7 == 0:
            store.get(f"key {max(0, number - 20)}")
        assert store.stats().bytes <= BUDGET.max_bytes
        assert file_of(folder).with_suffix(".sqlite-wal").stat().st_size < 6e6
    store.check()
    assert store.get("key 599") is not None and store.get("key 0") is None
    store.close()
    assert BUDGET.max_bytes * 0.8 < file_of(folder).stat().st_size <= BUDGET.max_bytes
    smaller = SqliteStore(folder, DiskBudget(2**18, 10))
    assert 0 < smaller.stats().entries <= 10
    smaller.check()
    smaller.close()
    assert file_of(folder).stat().st_size <= 2**18


def test_an_answer_larger_than_a_quarter_of_the_budget_evicts_nobody(store: SqliteStore) -> None:
    fill(store, 3)
    store.put("large", answer(1, 20_000))
    assert store.get("large") is None
    assert store.stats().entries == 3


def test_the_latest_budget_applies_to_all(store: SqliteStore, folder: Path) -> None:
    fill(store, 9)
    other = SqliteStore(folder, DiskBudget(2**20, 4))
    assert other.stats().entries == 4
    store.put("one more", answer(1))
    assert store.stats().entries == 4
    unaware = SqliteStore(folder)
    assert unaware.stats().max_entries == 4
    for each in (store, other, unaware):
        each.check()
        each.close()


def test_a_budget_smaller_than_an_empty_database_stores_nothing(store: SqliteStore, folder: Path) -> None:
    fill(store, 50)
    tiny = SqliteStore(folder, DiskBudget(4096, 5))
    tiny.put("key", answer(1))
    assert (tiny.stats().entries, tiny.stats().max_bytes) == (0, 4096)
    tiny.close()


def test_many_hits_without_a_write_are_recorded(store: SqliteStore, folder: Path) -> None:
    fill(store, 300)
    for number in range(256):
        store.touch(f"key {number}")
    (least,) = sqlite3.connect(file_of(folder)).execute("SELECT key FROM answers ORDER BY used LIMIT 1").fetchone()
    assert least == "key 256"


def test_clearing_leaves_nothing_to_read(store: SqliteStore, folder: Path) -> None:
    fill(store, 200)
    (folder / "responses.sqlite.corrupt-1").write_text("w7 ")
    store.clear()
    assert store.stats().entries == 0
    store.check()
    assert not [path for path in folder.iterdir() if b"w7 " in path.read_bytes()]


# ---- several users


def test_two_connections_see_each_other_at_once(store: SqliteStore, folder: Path) -> None:
    other = SqliteStore(folder, BUDGET)
    store.put("key", answer(1))
    assert other.get("key") == answer(1)
    other.put("key", answer(2))
    assert store.get("key") == answer(2)
    other.clear()
    assert store.get("key") is None
    other.close()


def test_readers_do_not_wait_for_a_writer_and_writers_time_out(
    store: SqliteStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.05)
    fill(store, 300)
    writer = sqlite3.connect(file_of(folder), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert all(store.get(f"key {number}") == answer(number) for number in range(300)), "uses cannot be recorded now"
    with pytest.raises(CacheError, match="locked"):
        store.put("new", answer(2))
    writer.execute("ROLLBACK")
    store.put("new", answer(2))
    store.check()
    writer.close()


def test_many_threads_may_open_it_at_once(folder: Path) -> None:
    stores = [SqliteStore(folder, BUDGET) for _ in range(6)]
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            stores[number].put(f"key {number}", answer(number))
        except CacheError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert stores[0].stats().entries == 6
    for store in stores:
        store.close()


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection(store: SqliteStore) -> None:
    fill(store, 3)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store.put("of the child", answer(8))
            status = 0 if store.get("key 1") == answer(1) else 2
            store.close()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert store.get("of the child") == answer(8)
    store.put("of the parent", answer(9))
    store.check()


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_lock_held_by_another_thread_does_not_block_a_forked_child(store: SqliteStore) -> None:
    cache = ResponseCache(outer=store)
    cache.put("key", answer(1))
    with store._lock, cache._memory._lock, cache._count:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if cache.get("key") == answer(1) else 2
            finally:
                os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@posix
@pytest.mark.parametrize("part", ["memory", "sqlite", "kill", "evict", "full"])
def test_a_short_run_of_the_stress_script(part: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "stress_caches.py"), "--seconds", "1.5", "--only", part]
    done = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(part)


# ---- damage


def damaged(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = source.randrange(4)
    if kind == 0:
        del data[source.randrange(len(data)) :]
    elif kind == 1:
        data[source.randrange(len(data)) :] = bytes(source.randrange(5_000))
    else:
        for _ in range(source.choice((1, 20, 500))):
            data[source.randrange(len(data))] = source.randrange(256)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(40))
def test_damage_in_random_places_gives_no_wrong_answer(seed: int, folder: Path) -> None:
    source = random.Random(seed)  # noqa: S311
    store = SqliteStore(folder, BUDGET)
    fill(store, 60)
    store.close()
    damaged(file_of(folder), source)
    kept = 0
    for number in range(60):
        with contextlib.suppress(CacheError):
            assert store.get(f"key {number}") in (None, answer(number))
            store.put(f"new {number}", answer(number))
            # None if an index was damaged: the read detects it, and a new database is made.
            found = store.get(f"new {number}")
            assert found in (None, answer(number))
            kept += found is not None
    assert kept > 50
    with contextlib.suppress(CacheError):
        store.close()


@pytest.mark.parametrize("content", [b"no database at all" * 500, b"SQLite format 3\0" + bytes(5_000)])
def test_a_damaged_file_is_set_aside_with_a_warning_and_replaced(
    content: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    (folder / "responses.sqlite.corrupt-1").write_bytes(b"from last year")
    file_of(folder).write_bytes(content)
    store = SqliteStore(folder, BUDGET)
    with pytest.raises(CacheCorruptError):
        store.check()
    assert file_of(folder).read_bytes() == content, "a check changes nothing"
    assert store.get("key") is None
    store.put("key", answer(1))
    store.check()
    store.close()
    (aside,) = folder.glob("responses.sqlite.corrupt-*")
    assert aside.read_bytes() == content
    assert "was damaged" in caplog.text and str(aside) in caplog.text


@pytest.mark.parametrize(
    "value",
    [encode_answer("key 2", answer(2)), b"A1" + bytes(40), b"", "text", 7],
    ids=["another", "zeros", "empty", "text", "number"],
)
def test_a_damaged_entry_is_found_by_a_check_and_set_aside_by_a_read(
    store: SqliteStore, folder: Path, value: object
) -> None:
    fill(store, 3)
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute("UPDATE answers SET value = ? WHERE key = 'key 1'", (value,))
    connection.close()
    with pytest.raises(CacheCorruptError):
        store.check()
    assert store.get("key 2") == answer(2)
    assert store.get("key 1") is None
    assert list(folder.glob("*.corrupt-*"))
    store.put("key 1", answer(1))
    store.check()


def test_two_processes_that_see_the_same_damage_set_it_aside_once(store: SqliteStore, folder: Path) -> None:
    fill(store, 2)
    other = SqliteStore(folder, BUDGET)
    other.get("key 0")
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute("UPDATE answers SET value = x'00'")
    connection.close()
    assert store.get("key 1") is None
    store.put("key 1", answer(1))
    assert other.get("key 1") == answer(1), "the new file is not mistaken for the old one"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE state SET entries = 5", "counter"),
        ("UPDATE state SET max_entries = 2", "budget"),
        ("UPDATE state SET max_bytes = 4096", "budget"),
        ("UPDATE answers SET created = 0 WHERE key = 'key 1'", "time"),
        ("DELETE FROM state", "counters"),
    ],
)
def test_check_finds_broken_invariants(store: SqliteStore, folder: Path, statement: str, found: str) -> None:
    fill(store, 3)
    store.check()
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(CacheCorruptError, match=found):
        store.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE state SET entries = 1000000",
        "UPDATE state SET entries = -1",
        "UPDATE state SET entries = 9223372036854775807, max_entries = -9223372036854775808",
        "UPDATE state SET max_bytes = 'many'",
        "UPDATE answers SET used = 9223372036854775807",
        "UPDATE answers SET used = 'never'",
        "DROP TRIGGER one_less",
        "DROP TABLE state",
        "DROP TABLE answers",
    ],
)
@pytest.mark.parametrize("budget", [None, DiskBudget(2**20, 7)], ids=["", "new budget"])
def test_inconsistent_counters_lead_to_a_new_database(folder: Path, statement: str, budget: DiskBudget | None) -> None:
    few = SqliteStore(folder, DiskBudget(2**20, 5))
    fill(few, 5)
    few.close()
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute(statement)
    connection.close()
    store = SqliteStore(folder, budget)
    fill(store, 10)
    assert store.get("key 9") == answer(9)
    assert list(folder.glob("*.corrupt-*"))
    store.check()


def test_someone_elses_database_is_set_aside_whole(folder: Path) -> None:
    folder.mkdir(parents=True)
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute("CREATE TABLE photos (name)")
    connection.close()
    store = SqliteStore(folder, BUDGET)
    store.put("key", answer(1))
    store.close()
    (aside,) = folder.glob("*.corrupt-*")
    assert sqlite3.connect(aside).execute("SELECT count(*) FROM photos").fetchone() == (0,)


# ---- files and disks that are not as they should be


def test_the_file_of_a_newer_version_stays_untouched(store: SqliteStore, folder: Path) -> None:
    fill(store, 3)
    store.close()
    with sqlite3.connect(file_of(folder)) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    before = file_of(folder).read_bytes()
    for call in (lambda: store.get("key 1"), lambda: store.put("key 1", answer(1)), store.clear, store.check):
        with pytest.raises(CacheVersionError, match="version 2, this edgelm knows 1"):
            call()
    assert file_of(folder).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"responses.sqlite", "responses.lock"}


def test_a_file_in_place_of_the_folder_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="check its folder and disk"):
            SqliteStore(folder).get("key")


def test_a_python_without_sqlite_is_a_cache_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with pytest.raises(CacheError, match="without sqlite3"):
        SqliteStore(folder).get("key")


@posix
def test_a_folder_that_vanishes_is_made_again(store: SqliteStore, folder: Path) -> None:
    fill(store, 3)
    shutil.rmtree(folder.parent)
    assert store.get("key 1") is None
    store.put("key 1", answer(1))
    assert store.get("key 1") == answer(1)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(CacheError):
        store.put("key 1", answer(1))
    folder.unlink()
    store.put("key 1", answer(1))
    store.check()


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_write_permission_is_a_cache_error(store: SqliteStore, folder: Path) -> None:
    fill(store, 3)
    store.close()
    folder.chmod(0o500)
    try:
        for path in (folder, folder / "new"):
            with pytest.raises(CacheError, match="check its folder and disk"):
                SqliteStore(path).put("key", answer(1))
    finally:
        folder.chmod(0o700)
    assert store.get("key 1") == answer(1)


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from edgelm.runtime.caches.responses.answers import CachedAnswer
from edgelm.runtime.caches.responses.database import DiskBudget
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.errors import CacheError

disk = Path(sys.argv[1])
def mount(*options): subprocess.run(["mount", *options, str(disk)], check=True)
def answer(number): return CachedAnswer(((f"word {number} " * 200, (number,)),), "stop")

mount("-t", "tmpfs", "-o", "size=600k", "tmpfs")
store, stored = SqliteStore(disk / "r", DiskBudget(2**30, 10**6)), []
def fill():
    for number in range(2000):
        store.put(str(number), answer(number))
        stored.append(number)
try: fill()
except CacheError as error: print("full:", error)
assert stored and all(store.get(str(number)) == answer(number) for number in stored)
SqliteStore(disk / "r").clear()
assert store.get("1") is None
store.put("1", answer(1))
assert store.get("1") == answer(1)
store.close()
with open(disk / "filler", "wb", buffering=0) as filler:
    try:
        while True: filler.write(b" " * 4096)
    except OSError: pass
checked = SqliteStore(disk / "r")
checked.check()
assert checked.stats().entries
checked.close()
(disk / "filler").unlink()
mount("-o", "remount,size=4m")
store.put("more", answer(1))
store.check()
store.close()
mount("-o", "remount,ro")
for call in (lambda: store.put("x", answer(1)), lambda: SqliteStore(disk / "new").get("x")):
    try: call()
    except CacheError as error: print("read-only:", error)
mount("-o", "remount,rw")
assert store.get("more") == answer(1)
subprocess.run(["umount", "--lazy", str(disk)], check=True)
assert store.get("more") is None
store.put("more", answer(2))
store.check()
print("gone")
"""


def test_a_full_a_read_only_and_a_vanished_disk(tmp_path: Path) -> None:
    done = on_a_small_disk(ON_A_SMALL_DISK, tmp_path)
    assert done.returncode == 0, done.stderr
    kinds = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert kinds == ["full", "read-only", "read-only", "gone"], done.stdout


def test_every_error_of_sqlite_becomes_a_cache_error(folder: Path) -> None:
    errors = [item for item in vars(sqlite3).values() if isinstance(item, type) and issubclass(item, sqlite3.Error)]
    assert len(errors) >= 9
    for error in errors:
        with pytest.raises(CacheError), mapped_errors(folder):
            raise error("some reason")
