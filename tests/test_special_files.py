"""FIFOs, devices, links to them and huge sparse files in place of edgelm's files: an error or a warning at once."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.caches.budgets import FILE_NAME, Budgets, default_budgets, read_budgets
from edgelm.runtime.caches.prefixes.files import BlockFiles, check_all, read_budget
from edgelm.runtime.caches.responses.database import FILE_NAME as DATABASE
from edgelm.runtime.caches.responses.database import Database
from edgelm.runtime.commands.text_file import read_text as text_of_user
from edgelm.runtime.errors import (
    BundleCorruptError,
    BundleMissingError,
    CacheCorruptError,
    CacheError,
    EdgelmError,
    PromptError,
)
from edgelm.runtime.host import files
from edgelm.runtime.sessions import prepared
from edgelm.runtime.sessions.foreign import open_foreign
from edgelm.runtime.sessions.prepared import Prepared

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="makes Linux's special files")
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    """Fail a test that waits for a writer of a FIFO, instead of hanging."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros_without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


def folder(path: Path) -> None:
    path.mkdir()


KINDS = [fifo, zeros_without_end, sparse, folder]


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind.__name__))
def put(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Puts a special file in place of a file that may exist."""

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        request.param(path)

    return replace


def test_reading_is_refused_with_a_reason(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "x")
    for read in (files.read_bytes, files.read_text):
        with pytest.raises(OSError, match=r"regular file|bytes, more than|directory"):
            read(tmp_path / "x", 1000)


def test_a_regular_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("a\r\n\u00e4".encode())
    assert files.read_text(path, 5) == files.read_text(path) == "a\r\n\u00e4"
    with pytest.raises(files.UnfitFileError, match="5 bytes, more than 4"):
        files.read_bytes(path, 4)
    path.write_bytes(b"a\xff")
    for most in (None, 9):
        with pytest.raises(files.UnfitFileError, match=r"not UTF-8 text .* at byte 1"):
            files.read_text(path, most)


@pytest.mark.parametrize("name", ["a\x00b", "\ud83d"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    for most in (None, 9):
        with pytest.raises(OSError, match="no file has such a name"):
            files.read_text(Path(name), most)


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pipe_that_a_user_names_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    if os.fork() == 0:
        (tmp_path / "pipe").write_text("Once")
        os._exit(0)
    assert text_of_user(tmp_path / "pipe") == "Once"
    os.wait()
    with pytest.raises(PromptError, match="cannot be read"):
        text_of_user(tmp_path / "none")


def test_budgets(tmp_path: Path, put: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / FILE_NAME)
    with pytest.raises(CacheError):
        read_budgets(tmp_path)
    monkeypatch.setenv("EDGELM_HOME", str(tmp_path))
    assert default_budgets() == Budgets()


def test_the_budget_of_prefixes(tmp_path: Path, put: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "budget")
    assert read_budget(tmp_path) is None
    assert "the default budget counts" in caplog.text


def test_a_block_of_a_prefix(tmp_path: Path, put: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    block = np.arange(100, dtype=np.uint8)
    BlockFiles(tmp_path, 1 << 20).put(KEY, 1e9, block)
    (path,) = tmp_path.glob("*/*.kv")
    put(path)
    with caplog.at_level(logging.WARNING):
        assert BlockFiles(tmp_path, 1 << 20).read(KEY, block.nbytes) is None
    assert "damaged" in caplog.text or "cannot be read" in caplog.text
    put(path) if not path.exists() else None
    with pytest.raises((CacheCorruptError, OSError)):
        check_all(tmp_path, 1 << 20)
    small = BlockFiles(tmp_path, 1 << 16)
    small.put(bytes(32), 1e9, block)  # a budget this small evicts what it finds
    kept = small.read(bytes(32), block.nbytes)
    assert kept is not None and np.array_equal(kept, block)


def test_notes_of_prepared_weights(tmp_path: Path, put: Callable[[Path], None]) -> None:
    found = Prepared("sha256:0", tmp_path)
    found.folder.mkdir()
    for name in prepared._FILES:
        (found.folder / name).write_text("")
    put(found.folder / "checks.json")
    assert not found.is_there()
    with pytest.raises(CacheCorruptError, match=r"checks.json cannot be read"):
        found.check()


def test_a_database(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / DATABASE)
    try:
        Database(tmp_path).connection.close()
    except CacheError as error:
        assert str(tmp_path) in str(error)
    else:  # a sparse file counts as damaged
        assert list(tmp_path.glob(f"{DATABASE}.corrupt-*"))


def test_a_manifest_and_a_bundles_files(tmp_path: Path, put: Callable[[Path], None], tiny_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        (bundle / name).symlink_to(tiny_bundle / name)
    put(bundle / "manifest.json")
    with pytest.raises((BundleMissingError, BundleCorruptError)):
        Bundle.open(bundle)
    for name in ("model.onnx", "tokenizer.json"):
        put(bundle / name)
        for size in (0, 40 << 30) if name == "tokenizer.json" else (0,):
            manifest["files"][name]["bytes"] = size
            if (bundle / "manifest.json").is_dir():
                (bundle / "manifest.json").rmdir()
            (bundle / "manifest.json").unlink(missing_ok=True)
            (bundle / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(EdgelmError):
                Bundle.open(bundle).read_text("tokenizer.json")


def test_a_folder_of_another_exporter(tmp_path: Path, put: Callable[[Path], None]) -> None:
    fixture = Path(__file__).parent / "fixtures" / "optimum"
    for name in ("config.json", "tokenizer.json", "model.onnx"):
        place = tmp_path / name
        place.mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx"):
            (place / file).symlink_to(fixture / file)
        put(place / name)
        if name == "model.onnx" and not (place / name).is_file():
            continue  # without the file there is no graph to open
        with pytest.raises(EdgelmError):
            open_foreign(place, None, 1)
