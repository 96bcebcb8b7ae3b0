"""The runtime's own tests on other Python versions, over bundles exported by this one; skipped for interpreters that
are not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ROOT

VERSIONS = ("3.12", "3.13")
# Tests of decoding, caches and settings. Only comparisons with transformers or torch need the exporter.
QUICK = ("kv", "decode", "stops", "prefix_files", "settings")
ALL = (*QUICK, "exactness", "batch", "cached_engine", "generation", "prefix_cache", "response_cache", "structured")
ALL += ("sqlite_store", "scheduler", "cache_budgets", "machine", "memory", "cpuid", "errors", "special_files")
WITHOUT = "not transformers and not torch"


def interpreter(version: str) -> str | None:
    """A Python of this version: found by its name or in pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *map(str, root.glob(f"versions/{version}.*/bin/python"))]
    return next((path for path in candidates if path is not None and works(path)), None)


def works(path: str) -> bool:
    """pyenv's shim for a version that is not selected does not run."""
    return subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def bundles(export_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the option --bundles."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "tiny").symlink_to(export_tiny())
    (folder / "tiny-kv-float32").symlink_to(export_tiny(kv="float32"))
    return folder


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with edgelm and its tests' packages, in the tested versions, from the package index."""
    found = interpreter(request.param)
    if found is None:
        pytest.skip(f"Python {request.param} is not installed")
    venv = tmp_path_factory.mktemp("python") / request.param
    subprocess.run([found, "-m", "venv", str(venv)], check=True)
    options = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    words = ["-m", "pip", "install", *options, str(wheel), "pytest", "hypothesis", "llguidance"]
    subprocess.run([str(venv / "bin" / "python"), *words], check=True)
    return venv / "bin" / "python"


def run(python: Path, bundles: Path, names: tuple[str, ...]) -> str:
    """The last line of pytest."""
    files = [f"tests/test_{name}.py" for name in names]
    words = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--bundles", str(bundles), "-k", WITHOUT, *files]
    home = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(bundles)}
    done = subprocess.run(words, cwd=ROOT, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("names", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_runtimes_own_tests_pass(python: Path, bundles: Path, names: tuple[str, ...]) -> None:
    last = run(python, bundles, names)
    assert "passed" in last and "failed" not in last
