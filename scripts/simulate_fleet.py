"""Estimate how many boards a number of users needs: measure a server's steps, simulate fleets, check the simulation.

    python scripts/simulate_fleet.py measure BUNDLE --threads 2 --times times.json     on the board itself
    python scripts/simulate_fleet.py check BUNDLE --threads 2 --times times.json       the real server beside the model
    python scripts/simulate_fleet.py plan --times times.json [--slower 4] [--boards 1 100 1000]
    python scripts/simulate_fleet.py policies --times times.json [--boards 100] [--users-per-board 8]

`measure` starts `edgelm serve` and writes the durations of steps, prompts and requests. `check` lets users talk with
the server and with its model, and prints both; exit status 1 if they differ by more than --most-error-percent. `plan`
finds how many users a board takes, and the times they see in fleets. `policies` compares ways for a proxy to choose
boards, with and without failing boards. --slower: a machine that takes so many times as long for everything. Users ask,
read, think and ask again, with the conversation so far; docs/fleet.md lists the assumptions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench_server import served
from fleet.load import Load
from fleet.outcome import Outcome
from fleet.real import measure, talk
from fleet.simulation import POLICIES, Fleet
from fleet.times import StepTimes

# Acceptable to users: 95 of 100 first tokens, and 95 of 100 gaps between tokens, within so many seconds.
FIRST_S, GAP_S = 2.0, 0.25
# Short turns, so that the check covers many; users of a plan are slower.
_CHECKED = Load(6, prompt=50, answer=40, think_s=1.5, turns=4, preamble=100, answers_return=False)
_PLANNED = Load(1)


def main() -> int:
    """Run the subcommand. Returns the exit status."""
    arguments = parse()
    if arguments.act == "measure":
        with served(arguments.bundle, arguments.threads, ["--no-response-cache", "--no-prefix-cache"]) as (address, _):
            asyncio.run(measure(address, arguments.rows, arguments.piece)).write(arguments.times)
        print(arguments.times.read_text(encoding="utf-8"), end="")
        return 0
    times = StepTimes.read(arguments.times).slower(arguments.slower)
    if arguments.act == "check":
        return check(arguments, times)
    if arguments.act == "plan":
        plan(arguments, times)
    else:
        compare_policies(arguments, times)
    return 0


def parse() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    acts = parser.add_subparsers(dest="act", required=True)
    for name in ("measure", "check", "plan", "policies"):
        act = acts.add_parser(name)
        act.add_argument("--times", type=Path, required=True, metavar="FILE")
        act.add_argument("--slower", type=float, default=1.0, metavar="FACTOR")
        act.add_argument("--seconds", type=float, default=60.0 if name == "check" else 600.0)
        if name in ("measure", "check"):
            act.add_argument("bundle")
            act.add_argument("--threads", type=int, default=2)
        if name == "measure":
            act.add_argument("--rows", type=int, default=12, help="texts that the server computes at once (12)")
            act.add_argument(
                "--piece",
                type=int,
                default=384,
                help="tokens of a prompt that it feeds at once (384, without kernels 256)",
            )
        if name == "check":
            act.add_argument("--most-error-percent", type=float, default=15.0)
            act.add_argument("--users", type=int, default=_CHECKED.users)
        if name == "plan":
            act.add_argument("--boards", type=int, nargs="+", default=[1, 10, 100, 1000])
        if name == "policies":
            act.add_argument("--boards", type=int, default=100)
            act.add_argument("--users-per-board", type=float, default=8.0)
    return parser.parse_args()


def check(arguments: argparse.Namespace, times: StepTimes) -> int:
    """Run the same users with the real server and with its model. Returns the exit status."""
    load = replace(_CHECKED, users=arguments.users)
    with served(arguments.bundle, arguments.threads, ["--no-response-cache"]) as (address, _):
        real = asyncio.run(talk(address, load, arguments.seconds)).figures()
    simulated = Fleet([times], load).run(arguments.seconds).figures()
    errors = {name: round(100 * (simulated[name] / real[name] - 1), 1) for name in real}
    print(json.dumps({"real": real, "simulated": simulated, "error_percent": errors}, indent=1))
    judged = ("tokens_per_s", "gap_mean_ms", "answer_p50_s")
    return 0 if all(abs(errors[name]) <= arguments.most_error_percent for name in judged) else 1


def content(outcome: Outcome) -> bool:
    """Return whether the times are acceptable to users."""
    return outcome.first_s(0.95) <= FIRST_S and outcome.gap_s(0.95) <= GAP_S


def users_of_a_board(times: StepTimes, boards: int, seconds: float) -> int:
    """The largest number of users per board with acceptable times."""
    fleet = [times] * boards

    def enough(users: int) -> bool:
        return content(run(fleet, users * boards, seconds))

    least, most = 0, 1
    while most < 1000 and enough(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if enough(middle) else (least, middle)
    return least


def run(fleet: Sequence[StepTimes], users: int, seconds: float, policy: str = "session", failing: int = 0) -> Outcome:
    """One simulation."""
    return Fleet(fleet, replace(_PLANNED, users=users), policy).run(seconds, failing=failing)


def plan(arguments: argparse.Namespace, times: StepTimes) -> None:
    """Print how many users a board takes, alone and in fleets, and the times they see."""
    print("boards | users a board | users | first token p50, p95 s | gap p95 ms | tokens/s | busy, mean and most")
    for boards in arguments.boards:
        # Larger fleets take as many users per board as 100 boards do, and 100 are simulated within minutes.
        each = users_of_a_board(times, min(boards, 100), arguments.seconds)
        print_line(str(boards), each, run([times] * boards, each * boards, arguments.seconds), each * boards)


def compare_policies(arguments: argparse.Namespace, times: StepTimes) -> None:
    """Print the times that users see with each policy, also while a tenth of the boards fails."""
    users = round(arguments.users_per_board * arguments.boards)
    for policy in POLICIES:
        for failing in (0, arguments.boards // 10):
            outcome = run([times] * arguments.boards, users, arguments.seconds, policy, failing)
            print_line(f"{policy}, {failing} fail", round(arguments.users_per_board), outcome, users)


def print_line(title: str, each: int, outcome: Outcome, users: int) -> None:
    """Print a row of a table."""
    first = f"{outcome.first_s(0.5):.2f}, {outcome.first_s(0.95):.2f}"
    busy = f"{mean(outcome.busy):.0%}, {max(outcome.busy):.0%}"
    cells = [
        title,
        each,
        f"{users:,}",
        first,
        f"{1000 * outcome.gap_s(0.95):.0f}",
        f"{outcome.tokens_per_s():,.0f}",
        busy,
    ]
    print(" | ".join(map(str, cells)), flush=True)


def mean(values: Sequence[float]) -> float:
    """The mean of a few values."""
    return sum(values) / len(values)


if __name__ == "__main__":
    raise SystemExit(main())
