"""`optimum-cli export edgelm` is found by optimum itself and works like `edgelm export`.

An installation of edgelm alone has no package `optimum`.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgelm.runtime.bundle.folder import REPORT_NAME, REPORT_PAGE_NAME, Bundle

from .conftest import ROOT, WIDE_TARGET


@pytest.fixture(scope="module")
def optimum_cli() -> list[str]:
    """The program; skips the test if optimum is not installed."""
    try:
        importlib.metadata.version("edgelm-optimum")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the plugin is not installed: pip install ./plugins/optimum")
    return [str(Path(sys.executable).with_name("optimum-cli"))]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_optimum_exports_as_edgelm_export_does(
    optimum_cli: list[str], tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    arguments = [str(tiny_model), "--target", WIDE_TARGET, "--out", "made", "--json"]
    done = run([*optimum_cli, "export", "edgelm", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    made, expected = Bundle.open(tmp_path / "made"), Bundle.open(tiny_bundle)
    assert json.loads(done.stdout)["digest"] == made.manifest.digest
    same = made.manifest.files.keys() - {REPORT_NAME, REPORT_PAGE_NAME}  # they contain times
    assert {name: made.manifest.files[name] for name in same} == {name: expected.manifest.files[name] for name in same}


def test_errors_are_one_line_and_help_names_the_arguments(optimum_cli: list[str], tmp_path: Path) -> None:
    command = [*optimum_cli, "export", "edgelm"]
    done = run([*command, "builtin:nothing"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("edgelm: error: no model 'nothing' comes with edgelm")
    assert "Traceback" not in done.stderr
    told = run([*command, "--help"], tmp_path)
    assert told.returncode == 0
    assert all(name in told.stdout for name in ("model", "--target", "--scheme", "--kv", "--out", "--force"))
    assert "edgelm" in run([*optimum_cli, "export", "--help"], tmp_path).stdout


def test_without_the_plugin_there_is_no_package_optimum(wheel: Path, tmp_path: Path) -> None:
    """An environment with only edgelm has no package optimum, not even an empty one."""
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "optimum" in name]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\ntry: import optimum\nexcept ImportError: print('fine')"
    done = run([sys.executable, "-I", "-S", "-c", code], tmp_path)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_plugin_is_a_distribution_of_one_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "plugins" / "optimum", source)
    done = run([*command, str(source)], tmp_path)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(made).namelist() if ".dist-info/" not in name]
    assert names == ["optimum/commands/register/register_edgelm.py"]
    assert made.name.startswith("edgelm_optimum-")
