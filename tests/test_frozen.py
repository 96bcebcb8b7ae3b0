"""Programs frozen by PyInstaller without options: moved to another folder, and without Python on the machine.

Installs from the package index, as the packaging tests do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import cli
from edgelm.runtime.frozen import hook_folders
from edgelm.runtime.sessions import kernels

from .conftest import ROOT
from .served import with_template

MOST_MB = 118  # without Python's own library, which some builds ship with debug symbols
MOST_MORE_RESIDENT = 10e6
CLI = "import sys\nfrom edgelm.runtime.cli import main\nsys.exit(main())\n"
APP = """import sys
from edgelm.runtime import estimate_memory, load
assert estimate_memory(sys.argv[1]).fits
with load(sys.argv[1], prefix_cache=True) as engine:
    engine.warm_up()
    done = engine.generate("Once", max_tokens=4)
    print(done.finish_reason, done.stats.resident_bytes)
"""
# A command of another distribution, laid out as its installation does.
PLUGIN = """SUMMARY = "say hello"
def add_arguments(parser): ...
def run(arguments):
    print("hello")
    return 0
"""


def test_the_hooks_are_where_pyinstaller_looks() -> None:
    (folder,) = map(Path, hook_folders())
    names = {path.name for path in folder.glob("hook-*.py")}
    numpys = {"hook-numpy.__config__.py", "hook-numpy.testing.py"}
    assert names == numpys | {f"hook-edgelm.runtime{part}.py" for part in ("", ".cli", ".server")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pyinstaller40"] == {"hook-dirs": "edgelm.runtime.frozen:hook_folders"}


def test_a_frozen_program_lists_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"here": "json", "gone": "edgelm_gone.commands.gone"}
    found = [importlib.metadata.EntryPoint(name, module, cli.COMMANDS_GROUP) for name, module in names.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    assert set(names) < set(cli._names())
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "here" in cli._names() and "gone" not in cli._names()
    assert cli.main(["gone"]) == 2 and "unknown command 'gone'" in capsys.readouterr().err


def has_kernels() -> bool:
    """Whether compiled kernels of this version are installed; if so, they are packed."""
    if importlib.util.find_spec("edgelm_kernels") is None:
        return False
    import edgelm_kernels

    return bool(edgelm_kernels.INTERFACE == kernels._INTERFACE)


@dataclass(frozen=True)
class Frozen:
    """Folders of frozen programs, the memory that the program takes unfrozen, and an environment without Python."""

    folder: Path
    unfrozen_bytes: int
    environment: dict[str, str]

    def run(self, name: str, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        command = [str(self.folder / name / name), *map(str, words)]
        settings = {"capture_output": True, "text": True, "env": self.environment, "cwd": self.folder, **more}
        return subprocess.run(command, check=False, **settings)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_bundle, tmp_path_factory.mktemp("bündel 1") / "tiny")


@pytest.fixture(scope="module")
def frozen(wheel: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """Freeze the programs, move them, and hide the environment that froze them."""
    place = tmp_path_factory.mktemp("frozen")
    python = _environment(place / "venv", wheel)
    for name, text in (("cli", CLI), ("app", APP)):
        (place / f"{name}.py").write_text(text)
    for path in (ROOT / "examples" / "desktop").glob("*.py"):
        shutil.copy(path, place)
    for name in ("cli", "app", "desktop"):
        command = [str(python), "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR", f"{name}.py"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    environment = {"EDGELM_HOME": str(place / "home"), "EDGELM_KERNELS": "on", "HOME": str(place), "LANG": "C.UTF-8"}
    done = subprocess.run(
        [str(python), "app.py", str(bundle)], cwd=place, env=environment, capture_output=True, text=True, check=True
    )
    moved = place / "Programme für Ü"
    (place / "dist").rename(moved)
    shutil.rmtree(place / "build")
    (place / "venv").rename(place / "gone")
    return Frozen(moved, int(done.stdout.split()[1]), environment)


def _environment(folder: Path, wheel: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, f"{wheel}[serve]", "pyinstaller"], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    if has_kernels():
        import edgelm_kernels

        shutil.copytree(Path(edgelm_kernels.__file__).parent, packages / "edgelm_kernels")
    (packages / "edgelm_plugin.py").write_text(PLUGIN)
    about = packages / "edgelm_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: edgelm-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[edgelm.commands]\nhello = edgelm_plugin\n")
    (about / "RECORD").write_text("edgelm_plugin.py,,\nedgelm_plugin-1.0.dist-info/METADATA,,\n")
    return python


@pytest.mark.slow
def test_the_command_line_has_its_commands_and_those_of_others(frozen: Frozen) -> None:
    done = frozen.run("cli", "--help")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.split("commands:")[1]
    assert all(f"  {name} " in commands for name in ("run", "chat", "serve", "doctor", "cache", "hello"))
    # Commands that need torch are not packed, so they are not listed.
    assert "  export " not in commands and "cannot be imported" not in commands
    assert frozen.run("cli", "hello").stdout == "hello\n"
    refused = frozen.run("cli", "export", "builtin:tales")
    assert refused.returncode == 2 and "unknown command 'export'" in refused.stderr
    assert frozen.run("cli", "--version").stdout.startswith("edgelm 0.")


@pytest.mark.slow
def test_doctor_looks_at_the_frozen_program(frozen: Frozen) -> None:
    done = frozen.run("cli", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["extras"] == {} and "CPUExecutionProvider" in found["providers"]
    assert (found["kernels"] is not None) == has_kernels() and found["kernels_fault"] is None
    assert "frozen" in frozen.run("cli", "doctor").stdout


@pytest.mark.slow
def test_it_answers(frozen: Frozen, bundle: Path) -> None:
    done = frozen.run("cli", "run", bundle, "Once", "--max-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finish_reason"] in ("length", "stop")
    done = frozen.run("cli", "chat", bundle, "--max-tokens", "4", input="hello\n/context\n")
    assert done.returncode == 0, done.stderr
    assert "of 512 tokens" in done.stderr


@pytest.mark.slow
def test_a_frozen_program_serves_until_its_parent_closes_the_pipe(frozen: Frozen, bundle: Path) -> None:
    command = [str(frozen.folder / "cli" / "cli"), "serve", str(bundle), "--port", "0", "--ready-json"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=frozen.environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert json.loads(server.stdout.readline())["models"] == ["tiny"]
        server.stdin.close()
        assert server.wait(30) == 0


@pytest.mark.slow
def test_an_app_takes_no_more_memory_than_unfrozen_and_little_disk_space(frozen: Frozen, bundle: Path) -> None:
    done = frozen.run("app", bundle)
    assert done.returncode == 0, done.stderr
    reason, resident = done.stdout.split()
    assert reason in ("length", "stop")
    assert int(resident) - frozen.unfrozen_bytes < MOST_MORE_RESIDENT
    files = [path for path in (frozen.folder / "app").rglob("*") if not path.is_symlink()]
    sizes = [path.stat().st_size for path in files if not path.name.startswith("libpython")]
    assert sum(sizes) < MOST_MB * 1e6
    packed = {path.name for path in (frozen.folder / "app" / "_internal").iterdir()}
    assert not packed & {"torch", "transformers", "onnx", "huggingface_hub", "yaml", "httpx"}
    assert not [name for name in packed if "readline" in name]


@pytest.mark.slow
def test_the_example_with_a_window_finds_its_parts(frozen: Frozen) -> None:
    """Without a screen it can only print its usage, which imports all of it."""
    done = frozen.run("desktop", "--help")
    assert done.returncode == 0 and "a chat window for a model" in done.stdout, done.stderr


@pytest.mark.slow
def test_nothing_is_written_outside_the_home(frozen: Frozen, bundle: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in frozen.folder.rglob("*")}
    done = frozen.run("app", bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in frozen.folder.rglob("*")} == before
    kept = {path.name for path in Path(frozen.environment["EDGELM_HOME"]).iterdir()}
    assert not any(tmp_path.iterdir()) and kept <= {"prefixes", "responses"}
