"""The prefix cache's files, damaged, deleted and replaced: never a wrong block, never an error."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgelm.runtime import PrefixCacheSettings, load
from edgelm.runtime.caches.kinds import PrefixKind
from edgelm.runtime.caches.prefixes.block_file import HEADER_BYTES
from edgelm.runtime.caches.prefixes.files import (
    BlockFiles,
    check_all,
    delete_all,
    found_files,
    read_budget,
    time_of_use,
)
from edgelm.runtime.caches.prefixes.memory import Block
from edgelm.runtime.caches.prefixes.writer import BlockWriter
from edgelm.runtime.cli import main
from edgelm.runtime.errors import CacheCorruptError, CacheVersionError
from edgelm.runtime.host import files as host_files

from .conftest import TEXT
from .fake_clock import FakeClock

SIZE = 8000
ON_DISK = 8192  # with a header, in pages of 4096


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block_of(number: int) -> Block:
    return np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)


def file_of(folder: Path, number: int) -> Path:
    name = key_of(number).hex()
    return folder / name[:2] / f"{name}.kv"


def stored(folder: Path) -> set[int]:
    return {int(file.path.stem, 16) for file in found_files(folder)}


def put(files: BlockFiles, number: int) -> None:
    files.put(key_of(number), files._clock.wall(), block_of(number))


def holds(files: BlockFiles, number: int) -> bool:
    found = files.read(key_of(number), SIZE)
    assert found is None or np.array_equal(found, block_of(number)), "a wrong block"
    return found is not None


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "prefixes"


def test_stored_blocks_are_read_later(folder: Path) -> None:
    files = BlockFiles(folder, 2**20)
    assert not holds(files, 1)
    assert not folder.parent.exists(), "reading creates no folder"
    put(files, 1)
    assert holds(files, 1) and holds(BlockFiles(folder, 2**20), 1)
    check_all(folder, 2**20)
    delete_all(folder)
    assert not holds(files, 1)


# ---- damage


@pytest.mark.parametrize("place", [0, 9, 13, 20, HEADER_BYTES, HEADER_BYTES + SIZE - 1])
def test_a_flipped_bit_anywhere_is_detected(place: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    path = file_of(folder, 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 128
    path.write_bytes(data)
    with pytest.raises((CacheCorruptError, CacheVersionError)):
        check_all(folder, 2**20)
    assert path.exists(), "reading deletes nothing"
    assert not holds(files, 1)
    if place != 9:  # this byte makes it a newer version's file
        assert not path.exists() and len(warnings(caplog)) == 1 and "damaged" in warnings(caplog)[0]
        put(files, 1)
        assert holds(files, 1)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, 5000, HEADER_BYTES + SIZE + 1])
def test_another_length_is_detected(length: int, folder: Path) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    path = file_of(folder, 1)
    path.write_bytes((path.read_bytes() + b"more")[:length])
    assert not holds(files, 1)
    assert not path.exists()


def test_a_file_under_another_name_is_detected(folder: Path) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    file_of(folder, 1).rename(file_of(folder, 2))
    assert not holds(files, 2)


def make_newer(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[8:12] = (9).to_bytes(4, "little")
    path.write_bytes(data)
    return bytes(data)


def test_files_of_a_newer_version_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    data = make_newer(file_of(folder, 1))
    assert not holds(files, 1)
    put(files, 1)
    for number in range(2, 200):
        put(files, number)
    with pytest.raises(CacheVersionError, match="1 blocks"):
        delete_all(folder)
    assert stored(folder) == {1}
    assert file_of(folder, 1).read_bytes() == data
    assert not warnings(caplog)


# ---- budget


def test_files_keep_their_budget_by_evicting_the_least_recently_used(folder: Path) -> None:
    clock, budget = FakeClock(), 64 * ON_DISK
    files = BlockFiles(folder, budget, clock.clock)
    for number in range(64):
        clock.pass_time(1)
        put(files, number)
    assert stored(folder) == set(range(64))
    for number in range(10):
        clock.pass_time(1)
        put(files, number)  # counts as a use
    for number in range(100, 140):
        clock.pass_time(1)
        put(files, number)
        assert sum(file.bytes for file in found_files(folder)) <= budget
    assert set(range(10)) | set(range(100, 140)) <= stored(folder)
    check_all(folder, budget)


def test_a_texts_end_is_evicted_before_its_beginning(folder: Path) -> None:
    files, now = BlockFiles(folder, 16 * ON_DISK), time.time()
    for depth in range(16):
        time.sleep(0.003)
        files.put(key_of(depth), time_of_use(now, depth), block_of(depth))
    put(files, 99)
    left = stored(folder) - {99}
    assert left == set(range(len(left))) and len(left) < 16


def test_several_processes_share_the_budget(folder: Path) -> None:
    budget = 64 * ON_DISK
    several = [BlockFiles(folder, budget) for _ in range(3)]
    for number in range(300):
        put(several[number % 3], number)
        assert sum(file.bytes for file in found_files(folder)) <= budget + 3 * budget // 16


def test_the_latest_process_sets_the_budget_for_all(folder: Path) -> None:
    first, second = (BlockFiles(folder, pages * ON_DISK) for pages in (64, 32))
    for number in range(64):
        put(first, number)
    assert read_budget(folder) == 64 * ON_DISK
    put(second, 100)
    assert read_budget(folder) == 32 * ON_DISK
    assert len(stored(folder)) <= 32
    for number in range(200, 240):
        put(first, number)
    assert len(stored(folder)) <= 32 + 4


def test_a_block_larger_than_the_budget_is_not_stored(folder: Path) -> None:
    put(BlockFiles(folder, SIZE), 1)
    assert stored(folder) == set()


def test_files_from_the_future_are_evicted_first(folder: Path) -> None:
    """After a clock was set back, blocks used before must still be evicted."""
    clock = FakeClock()
    files = BlockFiles(folder, 16 * ON_DISK, clock.clock)
    clock.pass_time(1000)
    for number in range(8):
        put(files, number)
    clock.jump(-900)
    for number in range(100, 120):
        clock.pass_time(1)
        put(files, number)
    assert stored(folder) <= set(range(100, 120))


# ---- a folder that cannot be used


def test_a_full_disk_is_one_warning_and_stops_writing_for_a_minute(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    files = BlockFiles(folder, 2**20, clock.clock)
    put(files, 1)
    create, full = host_files.create, [True]

    class Full:
        def __init__(self, path: Path) -> None:
            self._file = create(path)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> None:
            self._file.write(bytes(data)[:100])
            if full[0] and len(data) > HEADER_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host_files, "create", Full)
    for number in range(2, 5):
        put(files, number)
        clock.pass_time(70)
    assert stored(folder) == {1} and holds(files, 1)
    assert not list(folder.glob("*/*.tmp"))
    assert len(warnings(caplog)) == 1 and "No space left" in warnings(caplog)[0]
    monkeypatch.setattr(host_files, "create", create)
    put(files, 5)
    assert holds(files, 5)


def in_the_way(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_text("")


def no_folder_can_be_made(place: Path) -> None:
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    place.parent.write_text("")


@pytest.mark.parametrize("prepare", [in_the_way, no_folder_can_be_made])
def test_a_folder_that_cannot_be_made_is_one_warning(
    prepare: Callable[[Path], None], folder: Path, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(folder)
    wanted = PrefixCacheSettings(folder=folder)
    with load(tiny_bundle, threads=1, response_cache=False, prefix_cache=wanted) as engine:
        for reused in (0, 96):
            engine.generate(TEXT[200:250], max_tokens=1)
            assert engine.generate(TEXT[:100], max_tokens=1).stats.reused_tokens == reused, "the memory cache goes on"
    assert len(warnings(caplog)) == 1 and "check its folder and disk" in warnings(caplog)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_folder_still_gives_what_it_holds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    for path in (file_of(folder, 1).parent, folder):
        path.chmod(0o500)
    put(files, 2)
    assert holds(files, 1) and not holds(files, 2)
    assert len(warnings(caplog)) == 1
    for path in (folder, file_of(folder, 1).parent):
        path.chmod(0o700)


def test_a_folder_that_vanishes_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = BlockFiles(folder, 2**20)
    put(files, 1)
    shutil.rmtree(folder.parent)
    assert not holds(files, 1)
    put(files, 1)
    assert holds(files, 1)
    assert not warnings(caplog)


def test_leftovers_of_killed_processes_are_deleted_after_an_hour(folder: Path) -> None:
    file_of(folder, 1).parent.mkdir(parents=True)
    young, old = (file_of(folder, 1).with_name(f".{name}.tmp") for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    put(BlockFiles(folder, 2**20), 1)
    assert young.exists() and not old.exists()
    delete_all(folder)
    assert not young.exists()


# ---- several processes

_WRITER = """
import sys
from pathlib import Path
from edgelm.runtime.caches.prefixes.files import BlockFiles
from tests.test_prefix_files import ON_DISK, put
files = BlockFiles(Path(sys.argv[1]), 40 * ON_DISK)
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    put(files, number % 70)
"""


def writer(folder: Path, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), str(count)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_processes_that_write_and_read_at_once_see_whole_blocks(folder: Path) -> None:
    processes = [writer(folder, 600) for _ in range(2)]
    files, seen = BlockFiles(folder, 40 * ON_DISK), 0
    while any(process.poll() is None for process in processes):
        seen += sum(holds(files, number) for number in range(70))
    assert [process.wait() for process in processes] == [0, 0]
    assert seen > 100
    check_all(folder, 40 * ON_DISK)


def test_a_kill_leaves_whole_blocks(folder: Path) -> None:
    for pause in (0.01, 0.03, 0.06):
        process = writer(folder, 10**6)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert stored(folder)
    check_all(folder, 40 * ON_DISK)


# ---- the thread that writes


def test_waiting_blocks_are_bounded_and_written_on_flush(folder: Path) -> None:
    files = BlockFiles(folder, 2**20)
    waiting = BlockWriter(files, 3 * SIZE)
    for number in range(5):
        assert waiting.wants(key_of(number))
        waiting.add(key_of(number), time.time(), block_of(number))
    waiting.flush()
    assert stored(folder) == {0, 1, 2}
    assert [waiting.wants(key_of(number)) for number in range(5)] == [False] * 3 + [True] * 2
    assert "edgelm-prefixes" not in {thread.name for thread in threading.enumerate()}


def test_a_use_is_recorded_at_most_once_a_minute(folder: Path) -> None:
    clock = FakeClock()
    waiting = BlockWriter(BlockFiles(folder, 2**20, clock.clock), 2**20, clock.clock)
    waiting.add(key_of(1), clock.wall(), block_of(1))
    waiting.flush()
    clock.pass_time(30)
    waiting.flush()
    assert not waiting.wants(key_of(1))
    clock.pass_time(31)
    waiting.flush()
    assert waiting.wants(key_of(1))


# ---- the commands


def test_commands_see_newer_and_damaged_files(edgelm_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = PrefixKind(edgelm_home)
    files = BlockFiles(kind.path, 2**20)
    for number in (1, 2):
        put(files, number)
    make_newer(file_of(kind.path, 1))
    for action in ("check", "clear"):
        assert main(["cache", action]) == 1
        assert "newer edgelm" in capsys.readouterr().err
    assert stored(kind.path) == {1}
    assert kind.stats().entries == 1 and kind.stats().bytes == ON_DISK
    file_of(kind.path, 1).write_bytes(b"garbage")
    assert main(["cache", "check"]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["cache", "clear"]) == 0
