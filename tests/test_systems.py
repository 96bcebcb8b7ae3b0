"""Windows and macOS, as far as Linux can test them: path names and lengths, volumes, consoles, processors, no forks."""

from __future__ import annotations

import ast
import ctypes
import io
import os
import struct
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from edgelm.runtime import cli
from edgelm.runtime.caches.prefixes.files import BlockFiles
from edgelm.runtime.caches.responses import database
from edgelm.runtime.caches.responses.answers import CachedAnswer
from edgelm.runtime.caches.responses.cache import ResponseCache, ResponseCacheSettings, open_response_cache
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.errors import CacheError
from edgelm.runtime.host import asked, file_lock, machine, memory, volumes
from edgelm.runtime.host.home import home
from edgelm.runtime.sessions.prepared import FOLDER_NAME, Prepared

from .conftest import ROOT
from .served import chat, client_of, saying_engine

# Windows allows 259 characters. `C:\\Users\\NAME\\AppData\\Local\\edgelm` has some 40.
MOST_LETTERS_BELOW_HOME = 120


# ---- paths


def test_no_path_below_the_home_is_long(edgelm_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    replace, rename = Path.replace, Path.rename
    monkeypatch.setattr(Path, "replace", lambda self, target: made.append(self) or replace(self, target))
    monkeypatch.setattr(Path, "rename", lambda self, target: made.append(self) or rename(self, target))
    BlockFiles(home() / "prefixes", 1 << 20).put(bytes(32), 1.0, np.zeros(100, np.uint8))
    with Prepared("sha256:1", home() / FOLDER_NAME).making() as folder:
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_bytes(b"x")
    store = SqliteStore(home() / "responses")
    store.put("key", CachedAnswer((("text", (1,)),), "stop"))
    made += edgelm_home.rglob("*")
    store.close()
    assert len(made) > 8
    assert max(len(str(path.relative_to(edgelm_home))) for path in made) <= MOST_LETTERS_BELOW_HOME


def test_a_model_is_found_under_either_unicode_form_of_its_name(tmp_path: Path) -> None:
    apart, together = (unicodedata.normalize(form, "modèle") for form in ("NFD", "NFC"))
    assert apart != together
    with saying_engine(tmp_path) as engine, client_of({apart: engine}) as client:
        for name in (apart, together):
            assert chat(client, model=name).json()["model"] == together


# ---- volumes


def mounted(monkeypatch: pytest.MonkeyPatch, path: Path, kind: str, options: str = "rw") -> None:
    parts = [
        SimpleNamespace(mountpoint="/", fstype="ext4", opts="rw"),
        SimpleNamespace(mountpoint=str(path), fstype=kind, opts=options),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nfs4", "rw"), ("cifs", "rw"), ("smbfs", "rw"), ("9p", "rw,aname=drvfs;path=C:"), ("NTFS", "rw,remote")],
)
def test_a_network_drive_is_detected(kind: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted(monkeypatch, tmp_path, kind, options)
    assert volumes.remote_volume(tmp_path / "not" / "there") == f"a network drive ({kind})"
    assert volumes.remote_volume(tmp_path.parent) is None


@pytest.mark.parametrize(("kind", "options"), [("ext4", "rw"), ("9p", "rw,trans=fd"), ("NTFS", "rw,fixed")])
def test_a_local_disk_is_no_network_drive(
    kind: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, tmp_path, kind, options)
    assert volumes.remote_volume(tmp_path) is None


def test_shares_and_synchronized_folders_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert volumes.remote_volume(Path("//wsl.localhost/Debian/home")) == "a network drive"
    monkeypatch.setenv("OneDrive", str(tmp_path))
    assert volumes.remote_volume(tmp_path / "edgelm") == "a folder that is copied to other machines"
    assert volumes.remote_volume(tmp_path.parent) is None


def test_answers_are_kept_in_memory_if_the_home_is_on_a_network_drive(
    edgelm_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edgelm_home.mkdir()
    mounted(monkeypatch, edgelm_home, "nfs4")
    cache = open_response_cache(ResponseCacheSettings())
    assert isinstance(cache, ResponseCache)
    answer = CachedAnswer((("text", (1,)),), "stop")
    for key in ("one", "two"):
        cache.put(key, answer)
        assert cache.get(key) == answer
    cache.close()
    (record,) = caplog.records
    assert "network drive (nfs4)" in record.message and "in memory only" in record.message
    assert not any(edgelm_home.iterdir())
    with pytest.raises(CacheError, match="set EDGELM_HOME"):
        database.Database(edgelm_home / "responses")


# ---- locks


class FakeMsvcrt:
    """Windows' byte locks: one descriptor of a file holds them, and closing it releases them only after some time."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        file = os.fstat(descriptor).st_ino
        free = self.holders.get(file) is None if mode == self.LK_NBLCK else self.holders.get(file) == descriptor
        if not free:
            raise PermissionError(13, "Permission denied")
        self.holders.pop(file, None)
        if mode == self.LK_NBLCK:
            self.holders[file] = descriptor


def test_a_windows_lock_has_one_holder_and_is_released_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMsvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr(sys, "platform", "win32")
    with file_lock.locked(tmp_path / "lock", 1.0):
        with file_lock.lock_if_free(tmp_path / "lock") as free:
            assert not free
        with pytest.raises(TimeoutError), file_lock.locked(tmp_path / "lock", 0.03):
            pass
        assert len(fake.holders) == 1, "a process without the lock releases nothing"
    assert not fake.holders
    with file_lock.lock_if_free(tmp_path / "lock") as free:
        assert free


# ---- consoles and processes


def test_output_to_a_file_is_utf_8_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cli, "_dispatch", lambda *_: print("你好 \ud800") or 0)
    assert cli.main([]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == "你好 \\ud800\n".encode()


def test_the_runtime_starts_no_process() -> None:
    """So frozen programs need no freeze_support, and the start method of processes does not matter."""
    starting = {"multiprocessing", "subprocess", "concurrent.futures.process"}
    for path in (ROOT / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not starting & {module, *names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("fork", "spawnv", "system", "posix_spawn", "popen"), path


# ---- processors


class FakeSysctl:
    """macOS's sysctlbyname over a dictionary of numbers and texts."""

    def __init__(self, values: dict[str, int | str]) -> None:
        self._values = values

    def sysctlbyname(self, name: bytes, found: object, size: object, new: object, new_size: object) -> int:
        value = self._values.get(name.decode())
        if value is None:
            return -1
        data = struct.pack("i", value) if isinstance(value, int) else value.encode() + b"\0"
        size._obj.value = len(data)  # type: ignore[attr-defined]
        if found is not None:
            ctypes.memmove(found, data, len(data))  # type: ignore[arg-type]
        return 0


@pytest.fixture
def _no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(machine.cpuid, "instruction_sets", lambda: None)


@pytest.mark.usefixtures("_no_proc")
def test_a_mac_reports_its_instruction_sets_large_cores_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, int | str] = {
        "hw.optional.arm.FEAT_DotProd": 1,
        "hw.optional.arm.FEAT_I8MM": 0,
        "hw.perflevel0.physicalcpu": 4,
        "machdep.cpu.brand_string": "Apple M3",
    }
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeSysctl(values))
    assert machine.instruction_sets() == {"asimddp"}
    assert machine.processor_name() == "Apple M3"
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr(machine, "_cgroup_cpus", lambda: None)
    assert machine.default_threads() == 4
    del values["hw.perflevel0.physicalcpu"]  # an older system, or only one kind of core
    assert machine.default_threads() == 8


@pytest.mark.usefixtures("_no_proc")
def test_windows_reports_its_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(IsProcessorFeaturePresent=lambda number: number == 40)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert machine.instruction_sets() == {"avx2"}


@pytest.mark.usefixtures("_no_proc")
def test_other_systems_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    assert machine.instruction_sets() == frozenset() and asked.large_cores() is None


def test_available_memory_is_known_without_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_OWN_CGROUP", Path("/nonexistent"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
    assert memory.available_bytes() == 12345
