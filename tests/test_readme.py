"""The commands and Python blocks of the README, docs/generation.md and docs/desktop.md run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATION = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
DESKTOP = (ROOT / "docs" / "desktop.md").read_text(encoding="utf-8")


def _blocks(language: str, document: str = README) -> list[str]:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    return [text for kind, text in blocks if kind == language]


PYTHON = [*_blocks("python"), *_blocks("python", GENERATION), *_blocks("python", DESKTOP)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands ran in order, except those that set up an environment, that the gate runs
    itself, or that fetch a model from the hub."""
    folder = tmp_path_factory.mktemp("readme")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("edgelm ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        if any(re.fullmatch(r"[\w.-]+/[\w.-]+", word) for word in words[2:3]):
            continue
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return folder


def test_commands_run(workplace: Path) -> None:
    assert any((path / "manifest.json").is_file() for path in workplace.iterdir())


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number: int, workplace: Path) -> None:
    code = PYTHON[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_is_described() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgelm.runtime.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in re.findall(r"^  (\w+) ", done.stdout.split("commands:")[1], re.MULTILINE):
        assert f"edgelm {command}" in README, f"the README does not describe  edgelm {command}"
