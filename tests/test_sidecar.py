"""`edgelm serve --ready-json` as a sidecar: it prints its address and ends with its parent. The example is in Node."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import ROOT, missing
from .served import eventually, with_template

SERVE = [sys.executable, "-m", "edgelm.runtime.cli", "serve", "--port", "0", "--ready-json", "--threads", "1"]
SCRIPT = """#!/bin/sh
exec "{python}" -m edgelm.runtime.cli "$@" --threads 1
"""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_bundle, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "edgelm"
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return path


def node(case: str, program: Path, bundle: Path) -> subprocess.CompletedProcess[str]:
    return run_node(ROOT / "tests" / "node" / "sidecar.mjs", case, program, bundle)


def run_node(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("node")
    if program is None:
        missing("node is not installed")
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)


def said(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_line_gives_the_address_and_closing_the_pipe_ends_the_server(bundle: Path) -> None:
    with subprocess.Popen(
        [*SERVE, str(bundle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None and server.stderr is not None
        ready = json.loads(server.stdout.readline())
        assert ready["address"].startswith("http://127.0.0.1:") and ready["models"] == ["tiny"]
        assert ready["pid"] == server.pid
        server.stdin.write("what is written is not read\n")
        server.stdin.flush()
        server.stdin.close()
        assert server.wait(20) == 0
        assert server.stdout.read() == "" and server.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="redirects with a POSIX shell")
@pytest.mark.parametrize("redirect", ["</dev/null", "<&-"])
def test_standard_input_that_is_no_pipe_does_not_end_the_server(bundle: Path, redirect: str) -> None:
    shell = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *SERVE, str(bundle)]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert json.loads(server.stdout.readline())["models"] == ["tiny"]
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_closing_the_pipe_while_a_model_loads_ends_the_server(bundle: Path) -> None:
    done = subprocess.run([*SERVE, str(bundle)], input="", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_node_gets_an_answer_piece_by_piece(program: Path, bundle: Path) -> None:
    found = said(node("answers", program, bundle))
    assert found["models"] == ["tiny"] and found["status"] == 0 and found["pieces"] > 1


def test_node_aborts_an_answer(program: Path, bundle: Path) -> None:
    assert said(node("aborts", program, bundle)) == {"pieces": 1, "status": 0}


def test_node_is_told_why_a_server_cannot_start(program: Path, tmp_path: Path) -> None:
    found = said(node("refuses", program, tmp_path / "nothing"))
    assert "is not a folder" in found["message"]


def test_no_server_outlives_a_program_that_is_killed(program: Path, bundle: Path) -> None:
    done = node("dies", program, bundle)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = json.loads(done.stdout)["pid"]
    assert eventually(lambda: not psutil.pid_exists(pid))


def test_the_examples_own_program_talks(program: Path, bundle: Path) -> None:
    done = run_node(ROOT / "examples" / "sidecar" / "talk.mjs", program, bundle, "hi")
    assert done.returncode == 0 and done.stdout.strip() and "tiny at http://" in done.stderr
