"""The distribution: declared files, files on disk, files in the wheel, and the packages of a base installation."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT
from .served import with_template

PACKAGES = ("export", "runtime", "targets")
MAX_BASE_MB = 200
SERVER_PACKAGES = ("starlette", "uvicorn", "anyio", "click", "h11", "idna", "typing_extensions")
NOT_OURS = {"pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack", "__pycache__"}


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    data: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return data


def _declared(project: dict[str, object]) -> list[str]:
    packages: list[str] = project["tool"]["setuptools"]["packages"]  # type: ignore[index]
    return packages


def test_declared_packages_are_those_on_the_disk(project: dict[str, object]) -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    on_disk = {".".join(("edgelm", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(_declared(project)) == on_disk


def test_the_wheel_holds_every_file_of_the_packages(project: dict[str, object], wheel: Path) -> None:
    on_disk = {
        "edgelm/" + path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == on_disk


def test_the_builtin_model_is_small() -> None:
    files = [path for path in (ROOT / "export" / "builtin").rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_a_base_install_is_small_has_no_torch_and_runs(wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Installs from the package index, in the tested versions."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        str(ROOT / "constraints.txt"),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    sizes = {
        entry.name: sum(
            path.stat().st_size for path in ([entry] if entry.is_file() else entry.rglob("*")) if path.is_file()
        )
        for entry in packages.iterdir()
        if not any(entry.name == name or entry.name.startswith(f"{name}-") for name in NOT_OURS)
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < MAX_BASE_MB * 1e6, largest
    assert not {"torch", "transformers", "onnx"} & sizes.keys()
    command = [str(venv / "bin" / "edgelm"), "run", str(tiny_bundle), "Once", "--max-tokens", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["stats"]["prompt_tokens"] == 4
    refused = subprocess.run(
        [str(venv / "bin" / "edgelm"), "export", "builtin:tales"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith('pip install "edgelm[export]"') and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_minimal_install_of_named_packages_answers_a_chat(wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """docs/desktop.md names what a device needs, without pip's other dependencies."""
    text = (ROOT / "docs" / "desktop.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install --no-deps edgelm (.*)$", text, re.MULTILINE)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel), *line.split()], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    assert not {"huggingface_hub", "hf_xet", "yaml", "google"} & {path.name for path in packages.iterdir()}
    bundle = with_template(tiny_bundle, tmp_path / "tiny")
    for words in (["run", str(bundle), "Once", "--chat", "--max-tokens", "4"], ["doctor"], ["inspect", str(bundle)]):
        done = subprocess.run([str(venv / "bin" / "edgelm"), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_servers_packages_are_small() -> None:
    """In MB, for everything that the extra `serve` adds to the base installation."""
    found = [distribution for name in SERVER_PACKAGES for distribution in [importlib.metadata.distribution(name)]]
    files = [path.locate() for distribution in found for path in distribution.files or []]
    sizes = [Path(path).stat().st_size for path in map(str, files) if path.endswith((".py", ".pyi", ".txt"))]
    assert sum(sizes) < 4e6
    assert not [path for path in map(str, files) if path.endswith((".so", ".pyd"))]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_run_opens_no_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    command = ["strace", "-f", "-e", "trace=%network", "-o", str(log), sys.executable, "-m", "edgelm.runtime.cli"]
    subprocess.run([*command, "run", str(tiny_bundle), "Once", "--max-tokens", "4"], check=True, capture_output=True)
    calls = [line for line in log.read_text().splitlines() if "socket(" in line or "connect(" in line]
    assert calls == []
