"""`optimum-cli export edgelm`: the wheel beside optimum itself, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from edgelm.runtime.bundle import Bundle


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that sees nothing but its own environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def optimum_cli(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, or skip the test where pip cannot get it. torch and transformers are those of this environment."""
    venv = tmp_path_factory.mktemp("optimum") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "exporter.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    done = subprocess.run([*install, "optimum>=2.3"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install optimum here: {(done.stderr.splitlines() or ['no reason'])[-1]}")
    subprocess.run([*install, str(wheel)], check=True)
    return venv / "bin" / "optimum-cli"


def test_it_exports_as_edgelm_export_does(
    optimum_cli: Path, tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    command = [str(optimum_cli), "export", "edgelm", str(tiny_model), "--target", "x86-cpu", "--out", "made", "--json"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    made, expected = Bundle.open(tmp_path / "made"), Bundle.open(tiny_bundle)
    assert json.loads(done.stdout)["digest"] == made.manifest.digest
    same = made.manifest.files.keys() - {"report.json"}
    assert {name: made.manifest.files[name] for name in same} == {name: expected.manifest.files[name] for name in same}


def test_errors_are_one_line_and_help_names_the_arguments(optimum_cli: Path, tmp_path: Path) -> None:
    command = [str(optimum_cli), "export", "edgelm"]
    done = run([*command, "builtin:nothing"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("optimum-cli: error: no model 'nothing' comes with edgelm")
    assert "Traceback" not in done.stderr
    told = run([*command, "--help"], tmp_path)
    assert told.returncode == 0
    assert all(name in told.stdout for name in ("model", "--target", "--scheme", "--kv", "--out", "--force"))
