"""Placing an export's folder: locks tell which export uses a scratch folder, and no kill loses a bundle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgelm.export.errors import OutputError
from edgelm.export.output import place
from edgelm.runtime.host.file_lock import lock_if_free, locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
OLD_TIME = time.time() - 3600

# A process that replaces out and is killed at the named step.
REPLACE = """
import os, signal, sys
from pathlib import Path
from edgelm.export.output import place
out, step = Path(sys.argv[1]), sys.argv[2]
if step != "exchanged":
    place._exchange = lambda *_: False
renames = []
rename = Path.rename
def killed(self, target):
    renames.append(target)
    if step == f"before rename {len(renames)}":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
with place.partial_folder(out) as work:
    (work / "result").mkdir()
    (work / "result" / "manifest.json").write_text("new")
    place.put_in_place(work / "result", out)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def bundle(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    return folder


def text_of(out: Path) -> str:
    return (out / "manifest.json").read_text()


@pytest.mark.parametrize("step", ["before rename 1", "before rename 2", "after both", "exchanged"])
def test_a_kill_while_a_bundle_is_replaced_loses_no_bundle(step: str, tmp_path: Path) -> None:
    out = bundle(tmp_path / "out", "old")
    done = subprocess.run([sys.executable, "-c", REPLACE, str(out), step], check=False)
    assert done.returncode == -signal.SIGKILL
    if step == "before rename 2":
        assert not out.exists()  # until the next export
    with place.partial_folder(out) as work:
        assert text_of(out) == ("old" if step.startswith("before") else "new")
        assert sorted(tmp_path.iterdir()) == sorted([out, work])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange two folders")
def test_a_replaced_bundle_exists_at_every_moment(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out", "0")
    reader = os.fork()
    if reader == 0:
        end = time.monotonic() + 2
        while time.monotonic() < end and (out / "manifest.json").exists():
            pass
        os._exit(int(time.monotonic() < end))
    for number in range(20):
        with place.partial_folder(out) as work:
            place.put_in_place(bundle(work / "result", str(number)), out)
        assert text_of(out) == str(number)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def test_scratch_folders_of_dead_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    """Locks decide, because another container has the same process ids."""
    out = tmp_path / "out"
    with place.partial_folder(out) as first, place.partial_folder(out) as second:
        assert first != second and first.exists()
        os.utime(first, (OLD_TIME, OLD_TIME))
        with place.partial_folder(out):
            assert first.exists() and second.exists()
    assert not list(tmp_path.iterdir())
    dead = tmp_path / (f".out.partial-{'0' * 16}")
    dead.mkdir()
    (dead / "lock").touch()
    fresh = tmp_path / (f".out.partial-{'1' * 16}")
    fresh.mkdir()
    old = tmp_path / (f".out.partial-{'2' * 16}")
    old.mkdir()
    os.utime(old, (OLD_TIME, OLD_TIME))
    others = [tmp_path / name for name in (".out.partial-notes", ".out.partial-17", f".other.partial-{'0' * 16}")]
    for other in others:
        other.mkdir()
        os.utime(other, (OLD_TIME, OLD_TIME))
    with place.partial_folder(out) as work:
        assert sorted(tmp_path.iterdir()) == sorted([fresh, work, *others])


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), place.partial_folder(tmp_path / "file" / "out"):
        pass


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with lock_if_free(tmp_path / "lock") as held:
        assert held
        with lock_if_free(tmp_path / "lock") as again:
            assert not again
    with lock_if_free(tmp_path / "lock") as held:
        assert held


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("hold", [lock_if_free, lambda path: locked(path, 1)])
def test_a_forked_child_does_not_keep_its_parents_lock(hold: Any, tmp_path: Path) -> None:
    with hold(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with lock_if_free(tmp_path / "lock") as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
