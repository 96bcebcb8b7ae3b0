"""scripts/fuzz.py finds planted errors, and the same seed finds the same errors."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT

fuzz = pytest.importorskip("scripts.fuzz", reason="scripts/ is missing")
targets = pytest.importorskip("scripts.fuzzing.targets")
mutations = pytest.importorskip("scripts.fuzzing.mutations")


def test_some_trials_of_each_kind_find_nothing(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "scripts.fuzz", "--seconds", "8", "--bundle", str(tiny_bundle), "--only"]
    command += ["manifest", "template", "tokenizer", "settings", "messages", "budgets", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"([\d,]+) trials, 0 findings, seed 0", done.stdout.strip())
    assert found is not None and int(found[1].replace(",", "")) > 20


def raising(_: random.Random) -> None:
    raise KeyError("x")


def waiting(_: random.Random) -> None:
    while True:
        time.sleep(0.01)


def working(_: random.Random) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (raising, "KeyError: 'x'"),
        (waiting, "HangError: it takes more than 2 s,"),
        (working, "HangError: it takes more than 1 s of work,"),
    ],
)
def test_unexpected_exceptions_and_hangs_are_findings(
    target: object, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    monkeypatch.setattr(fuzz, "LONGEST_WORK_S", 1)
    monkeypatch.setattr(fuzz, "LONGEST_WAIT_S", 60 if target is working else 2)
    old = {kind: signal.getsignal(kind) for kind in (signal.SIGALRM, signal.SIGPROF)}
    fuzz._watch_time()
    try:
        fuzz._try(target, "0:manifest:7")
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)
    assert capsys.readouterr().out.startswith(f"finding\t0:manifest:7: {words}")


def test_a_crash_is_a_finding_and_the_other_trials_go_on(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that kills itself once, in its third trial."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "first = int(sys.argv[sys.argv.index('--worker') + 1])\n"
        "for number in range(first, 5):\n"
        "    print(f'trial\\tmanifest:{number}', flush=True)\n"
        "    if number == 2: os.abort()\n"
        "import time; time.sleep(float(sys.argv[sys.argv.index('--seconds') + 1]))\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **rest: real([sys.executable, str(worker), *command[3:]], **rest)
    )
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "2", "--bundle", str(tiny_bundle)])
    assert fuzz.main() == 1
    assert "manifest:2 ended the process with signal 6\n5 trials, 1 findings" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_input() -> None:
    def made(seed: str) -> str:
        return repr(mutations.changed(targets.MESSAGES, random.Random(seed)))  # noqa: S311

    assert made("0:messages:4") == made("0:messages:4")
    assert len({made(f"0:messages:{number}") for number in range(9)}) > 5
