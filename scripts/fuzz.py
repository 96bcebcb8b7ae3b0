"""Give edgelm random input of each external kind. The result must be an answer or one of edgelm's errors.

    python -m scripts.fuzz [--seconds 60] [--seed 0] [--only NAME ...] [--bundle FOLDER] [--trial NAME:NUMBER]

Kinds: manifest, template, tokenizer, settings, schema, messages, budgets, home, command, kernels (their graphs).
Findings are raw exceptions, changed answers, hangs, and crashes; each is printed with its trial, which --trial repeats.
Exit status 1 with findings. --bundle: the bundle to try; by default the model that comes with edgelm is exported.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from scripts.fuzzing.targets import Targets

# A trial that computes or waits longer counts as a hang. On a busy machine, seconds of work may take minutes.
LONGEST_WORK_S, LONGEST_WAIT_S = 20, 120
ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "build" / "fuzz" / "bundle"


class HangError(BaseException):
    """A trial takes too long. No subclass of Exception, which the code under test might catch."""


def main() -> int:
    """Parse, then try until the time is over. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to try (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these kinds")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="FOLDER", help="the bundle to try")
    parser.add_argument("--trial", metavar="NAME:NUMBER", help="run one trial and show its result")
    parser.add_argument("--worker", type=int, metavar="FIRST", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trial is not None or arguments.worker is not None:
        return work(arguments)
    if not arguments.bundle.exists():
        from edgelm.export import ExportConfig, export_model

        export_model(ExportConfig("builtin:tales", out=arguments.bundle))
    return watch(arguments)


def watch(arguments: argparse.Namespace) -> int:
    """Run trials in child processes. If a trial crashes its process, the next process continues after it. Returns the
    exit status."""
    end, first, findings = time.monotonic() + arguments.seconds, 0, 0
    while (left := end - time.monotonic()) > 0:
        command = [
            sys.executable,
            "-m",
            "scripts.fuzz",
            *sys.argv[1:],
            "--seconds",
            f"{left:.1f}",
            "--worker",
            str(first),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None, "its output is a pipe"
        last = ""
        for line in process.stdout:
            kind, _, rest = line.rstrip("\n").partition("\t")
            if kind == "trial":
                last = rest
                first = int(rest.partition(":")[2]) + 1
            else:
                findings += kind == "finding"
                print(rest if kind == "finding" else line, end="\n" if kind == "finding" else "", flush=True)
        if process.wait() < 0:
            findings += 1
            print(f"{last} ended the process with signal {-process.returncode}", flush=True)
        elif process.returncode:
            return 1
    print(f"{first:,} trials, {findings} findings, seed {arguments.seed}")
    return int(findings > 0)


def work(arguments: argparse.Namespace) -> int:
    """Run trials, or the named one. Each is printed before it begins."""
    logging.disable(logging.CRITICAL)
    _watch_time()
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(arguments.bundle.resolve(), Path(folder)).all()
        if arguments.trial is not None:
            name, _, number = arguments.trial.partition(":")
            targets[name](random.Random(f"{arguments.seed}:{name}:{number}"))  # noqa: S311
            return 0
        end, names = time.monotonic() + arguments.seconds, arguments.only or list(targets)
        for number in itertools.count(arguments.worker):
            if time.monotonic() > end:
                return 0
            name = names[number % len(names)]
            print(f"trial\t{name}:{number}", flush=True)
            _try(targets[name], f"{arguments.seed}:{name}:{number}")
    raise AssertionError("trials have no end but the time")


def _try(target: object, trial: str) -> None:
    assert callable(target), "a target is a function"
    signal.setitimer(signal.ITIMER_PROF, LONGEST_WORK_S)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT_S)
    try:
        target(random.Random(trial))  # noqa: S311
    except (Exception, HangError) as error:  # noqa: BLE001  these are the findings
        where = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())[:300]
        print(f"finding\t{trial}: {type(error).__name__}: {words} ({where.filename}:{where.lineno})", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watch_time() -> None:
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)


def _hang(kind: int, frame: FrameType | None) -> NoReturn:
    place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    took = f"{LONGEST_WORK_S} s of work" if kind == signal.SIGPROF else f"{LONGEST_WAIT_S} s"
    raise HangError(f"it takes more than {took}, in {place}")


if __name__ == "__main__":
    sys.exit(main())
