"""edgelm on Windows-like files: tests of caches, prepared weights, bundles and exports run again on a layer that
refuses what Windows refuses."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelm.export.errors import OutputError
from edgelm.export.output import place
from edgelm.runtime.caches.prefixes import files as prefix_files
from edgelm.runtime.caches.responses.answers import CachedAnswer
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.errors import CacheError
from edgelm.runtime.host import files
from edgelm.runtime.sessions.prepared import Prepared, folders

from .conftest import ROOT
from .windows_files import (
    ALREADY_EXISTS,
    INVALID_NAME,
    SHARING_VIOLATION,
    TOO_LONG,
    WindowsFiles,
    needs_proc,
    windows_files,
)

__all__ = ["windows_files"]

pytestmark = needs_proc

AGAIN = (
    "cache_budgets",
    "cached_engine",
    "manifest_and_bundle",
    "place",
    "prefix_cache",
    "prefix_files",
    "prepared",
    "response_cache",
    "special_files",
    "sqlite_store",
)
# POSIX only: files that are deleted or moved while another connection has them open.
NOT_ON_WINDOWS = (
    "sqlite_store.py::test_two_connections_see_each_other_at_once",
    "sqlite_store.py::test_two_processes_that_see_the_same_damage_set_it_aside_once",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_these_tests_pass_on_windows_files_too(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.windows_files", "-x", f"tests/test_{name}.py"]
    left_out = [f"--deselect=tests/test_{test}" for test in NOT_ON_WINDOWS]
    done = subprocess.run([*command, *left_out], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- the layer itself


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[None]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        yield


def test_the_layer_refuses_what_windows_refuses(windows_files: WindowsFiles, tmp_path: Path) -> None:
    first, second, inner = tmp_path / "first", tmp_path / "second", tmp_path / "folder" / "inner"
    inner.parent.mkdir()
    for path in (first, second, inner):
        path.write_bytes(b"x" * 10)
    with mapped(first), mapped(inner):
        for act in (
            first.unlink,
            lambda: first.rename(tmp_path / "other"),
            lambda: second.replace(first),
            lambda: inner.parent.rename(tmp_path / "moved"),
        ):
            with pytest.raises(PermissionError):
                act()
    with pytest.raises(FileExistsError):
        first.rename(second)
    for name in ("nul.txt", "COM1", "a:b", "end.", "x" * 250):
        with pytest.raises(OSError, match="WinError"):
            (tmp_path / name).mkdir()
    codes = [int(refusal.partition(" ")[0]) for refusal in windows_files.refusals]
    assert codes[-6:] == [ALREADY_EXISTS, *[INVALID_NAME] * 4, TOO_LONG] and SHARING_VIOLATION in codes
    second.replace(first)
    first.unlink()
    inner.parent.rename(tmp_path / "moved")


# ---- renaming over an open file


def test_a_file_that_is_open_briefly_is_replaced(windows_files: WindowsFiles, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    reader = path.open()
    threading.Timer(0.1, reader.close).start()
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and windows_files.refusals
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_stays_open_is_unchanged(windows_files: WindowsFiles, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open(), pytest.raises(files.InUseError), files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_refusals_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def replace(self: Path, target: Path) -> Path:
        tries.append(target)
        raise PermissionError(1, "no")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError, match="no"):
        files.replace(tmp_path / "a", tmp_path / "b")
    assert len(tries) == 1


def test_a_block_being_read_counts_as_written(
    windows_files: WindowsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prefix_files.BlockFiles(tmp_path / "prefixes", 1 << 20)
    key, block = bytes(32), np.arange(100, dtype=np.uint8)
    store.put(key, 1.0, block)
    (path,) = [found.path for found in prefix_files.found_files(tmp_path / "prefixes")]
    # As if another process had written the file after this one looked.
    monkeypatch.setattr(prefix_files.BlockFiles, "_used", lambda *_: False)
    with path.open("rb"):
        store.put(key, 2.0, block)
    assert windows_files.refusals and not caplog.records
    found = store.read(key, block.nbytes)
    assert found is not None and found.tobytes() == block.tobytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_database_open_elsewhere_is_not_cleared_and_keeps_working(
    windows_files: WindowsFiles, tmp_path: Path
) -> None:
    first, second = SqliteStore(tmp_path / "responses"), SqliteStore(tmp_path / "responses")
    answer = CachedAnswer((("text", (1,)),), "stop")
    first.put("key", answer)
    with pytest.raises(CacheError, match="open"):
        second.clear()
    assert first.get("key") == answer
    first.close()
    second.clear()
    assert second.get("key") is None
    second.close()


# ---- mapped prepared weights and bundles


def fill(prepared: Prepared) -> None:
    with prepared.making() as folder:
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_bytes(name.encode())


def test_mapped_prepared_weights_are_removed_once_unmapped(windows_files: WindowsFiles, tmp_path: Path) -> None:
    prepared = Prepared("sha256:1", tmp_path / "prepared")
    fill(prepared)
    with mapped(prepared.folder / "model.onnx.data"):
        prepared.drop()
        assert not prepared.is_there()
        fill(prepared)  # remaining files of the old form are in the way
        assert not prepared.is_there()
        assert [path.name for path in (tmp_path / "prepared").iterdir()] == [prepared.folder.name]
    fill(prepared)
    assert prepared.is_there()
    prepared.check()


def test_leftover_prepared_weights_are_removed_by_the_next_one(windows_files: WindowsFiles, tmp_path: Path) -> None:
    first, second = (Prepared(f"sha256:{number}", tmp_path / "prepared", budget_bytes=30) for number in (1, 2))
    fill(first)
    os.utime(first.folder, (1, 1))
    with mapped(first.folder / "model.onnx.data"):
        fill(second)  # the budget holds one
        assert first.folder.exists() and folders(tmp_path / "prepared") == [second.folder]
    fill(second)
    assert not first.folder.exists() and second.is_there()


def test_a_bundle_that_a_program_has_loaded_is_not_replaced_and_stays_whole(
    windows_files: WindowsFiles, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"

    def export(text: str) -> None:
        with place.partial_folder(out) as work:
            result = work / "result"
            result.mkdir()
            for name in ("manifest.json", "model.onnx.data"):
                (result / name).write_text(text)
            place.put_in_place(result, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "_exchange", lambda *_: False)  # Windows cannot exchange folders
        export("old")
        with mapped(out / "model.onnx.data"), pytest.raises(OutputError, match="while a program has it open"):
            export("new")
        assert {path.read_text() for path in out.iterdir()} == {"old"}
        assert list(tmp_path.iterdir()) == [out]
        export("new")
    assert {path.read_text() for path in out.iterdir()} == {"new"}
