"""Measure the prefix cache on the reference model: time to the first token, cold, warm in memory, warm from disk.

    python scripts/bench_prefix.py [--work build/bench] [--shared 500] [--rounds 7] [--threads 2] [--json FILE]

Uses the bundle of `scripts/bench.py`, and exports it if it is missing. In a round, one process answers a prompt cold,
then an unrelated one, then one that shares its first tokens with the first; a second process finds only the files. The
home of each round starts empty. Prints medians and the medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reference_model import prepare

_REST = 8  # tokens of a prompt after the shared ones
_VOCABULARY = 40_000


def main() -> None:
    """Parse, then measure everything, or half of a round in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder of model and bundle")
    parser.add_argument("--shared", type=int, default=500, help="tokens that the prompts have in common (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    parser.add_argument("--worker", choices=("first", "restarted"), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bundle = arguments.work / "bundle-int8"
    if arguments.worker:
        print(json.dumps(_measure(bundle, arguments)))
        return
    prepare(arguments.work / "model", bundle, "int8")
    rounds = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as home:
            rounds.append(_in_process("first", home, arguments) | _in_process("restarted", home, arguments))
    report = _summarize(rounds)
    for name, value in report.items():
        print(f"{name:28}{value:10.4g}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"median": report, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")


def _in_process(worker: str, home: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", worker, "--home", home, "--work", str(arguments.work)]
    command += ["--shared", str(arguments.shared), "--threads", str(arguments.threads)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def _measure(bundle: Path, arguments: argparse.Namespace) -> dict[str, float]:
    from edgelm.runtime import PrefixCacheSettings, load

    settings = PrefixCacheSettings(folder=arguments.home / "prefixes")
    with load(bundle, threads=arguments.threads, response_cache=False, prefix_cache=settings) as engine:
        engine.generate(token_ids=[7] * 64, max_tokens=2)  # warm-up: the first steps of a process are slower
        ask = _Asker(engine, arguments.shared)
        if arguments.worker == "restarted":
            return {"disk_s": ask(0, 2)}
        figures = {"cold_s": ask(0, 0)}
        ask(1, 0)
        figures["memory_s"] = ask(0, 1)
        return figures


class _Asker:
    """Asks prompts for one token; a call returns the seconds to it."""

    def __init__(self, engine: Any, shared: int) -> None:
        self._engine, self._shared = engine, shared

    def __call__(self, beginning: int, rest: int) -> float:
        """beginning, rest: numbers of the prompt's shared part and of its short end."""
        ids = _ids(beginning, self._shared) + _ids(100 + rest, _REST)
        started = time.perf_counter()
        next(self._engine.stream(token_ids=ids, max_tokens=1))
        return time.perf_counter() - started


def _ids(seed: int, count: int) -> list[int]:
    return [1000 + (seed * 7919 + 7 * index) % _VOCABULARY for index in range(count)]


def _summarize(rounds: list[dict[str, float]]) -> dict[str, float]:
    report = {name: statistics.median(item[name] for item in rounds) for name in rounds[0]}
    for name in ("memory_s", "disk_s"):
        ratio = statistics.median(item[name] / item["cold_s"] for item in rounds)
        report[f"{name.removesuffix('_s')}_percent_of_cold"] = 100 * ratio
    return report


if __name__ == "__main__":
    main()
