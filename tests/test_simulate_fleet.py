"""The fleet simulation: results computed by hand, reproducible runs per seed, and the real server's times."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import ROOT
from .served import serving

# A step takes 10 ms per row, whatever the context; a prompt takes 1 ms a token and 5 ms a piece.
STEPS = tuple(0.01 * rows for rows in range(1, 5))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/simulate_fleet.py, imported with its own folder on the path, as when it runs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import simulate_fleet

        yield simulate_fleet
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def times(script: ModuleType) -> Any:
    return script.StepTimes(STEPS, 100, 0.0, (0.005, 0.001, 0.0), 0.0, piece=100, beside_rows=50)


@pytest.fixture
def board(script: ModuleType, times: Any) -> Any:
    from fleet.board import Board  # type: ignore[import-not-found]

    return Board(times, 1000)


def request(prompt: int, answer: int, arrival: float = 0.0, session: int = 0, known: int = 0) -> Any:
    from fleet.board import Request

    return Request(session, prompt, known, answer, arrival)


def test_one_request_takes_its_prompt_and_its_steps(board: Any) -> None:
    asked = request(250, 11)
    board.add(asked, 0.0)
    assert board.run_until(math.inf) == [asked]
    # Three pieces, then ten steps after the first token.
    assert asked.first == pytest.approx(3 * 0.005 + 0.25)
    assert asked.end == pytest.approx(asked.first + 10 * 0.01)
    assert sum(count for _, count in asked.gaps) == 10 and board.busy == pytest.approx(asked.end)


def test_rows_share_steps_and_prompts_come_between_them(board: Any) -> None:
    first, second = request(50, 100), request(100, 100, 0.2)
    board.add(first, 0.0)
    board.run_until(0.2)
    board.add(second, 0.2)
    board.run_until(math.inf)
    # Two pieces of 50 between steps of one row, then steps of two rows.
    stalls = [seconds for seconds, _ in first.gaps if seconds > 0.021]
    assert stalls == pytest.approx([0.01 + 0.055] * 2)
    assert second.gaps[0][0] == pytest.approx(0.02) and second.first == pytest.approx(board_step(0.2) + 0.13)


def board_step(now: float) -> float:
    """The end of the step running at a time: the first prompt took 55 ms, and a step takes 10 ms."""
    return 0.055 + math.ceil((now - 0.055) / 0.01) * 0.01


def test_more_requests_than_rows_wait_and_short_ones_go_first(board: Any) -> None:
    long = [request(10, 50) for _ in range(4)]
    waiting = [request(100, 5), request(10, 5)]
    for asked in long:
        board.add(asked, 0.0)
    board.run_until(0.05)
    for asked in waiting:
        board.add(asked, 0.05)
    ended = board.run_until(math.inf)
    assert len(ended) == 6 and waiting[1].first < waiting[0].first
    assert min(asked.first for asked in waiting) > min(asked.end for asked in long)


def test_earlier_turns_of_a_session_are_not_fed_again(board: Any) -> None:
    board.add(request(100, 20, session=1), 0.0)
    board.run_until(math.inf)
    again = request(170, 5, board.clock, session=1, known=120)
    board.add(again, board.clock)
    began = board.clock
    board.run_until(math.inf)
    # The last token of an answer is never fed.
    assert again.first - began == pytest.approx(0.005 + 0.001 * (170 - 119))


def test_the_same_seed_gives_the_same_figures(script: ModuleType, times: Any) -> None:
    load = script.Load(20, think_s=5)
    figures = [script.Fleet([times] * 5, load, policy).run(100).figures() for policy in ("session", "session", "two")]
    assert figures[0] == figures[1] != figures[2]


def test_failing_boards_do_not_stop_the_fleet(script: ModuleType, times: Any) -> None:
    load = script.Load(40, think_s=2)
    for policy in script.POLICIES:
        whole, failing = (script.Fleet([times] * 10, load, policy).run(200, failing=count) for count in (0, 5))
        assert failing.lost > 0 and failing.busy[9] > failing.busy[0]
        assert len(failing.requests) > 0.5 * len(whole.requests)
        assert failing.first_s(0.95) >= whole.first_s(0.95)


def test_more_users_wait_longer_and_slower_boards_take_fewer(script: ModuleType, times: Any) -> None:
    few, many = (script.run([times] * 2, users, 200).first_s(0.95) for users in (2, 60))
    assert few < many
    slow = script.users_of_a_board(times.slower(2), 1, 200)
    assert 0 < slow < script.users_of_a_board(times, 1, 200)


def test_the_fit_recovers_the_coefficients(script: ModuleType) -> None:
    from fleet.times import fit_prompt  # type: ignore[import-not-found]

    points = [(-(-n // 256), n, 0.003 * -(-n // 256) + 0.0005 * n + 1e-7 * n * n / 2) for n in (16, 100, 500, 1500)]
    assert fit_prompt(points) == pytest.approx((0.003, 0.0005, 1e-7), rel=1e-6)


def test_noisy_times_are_made_monotonic(script: ModuleType) -> None:
    from fleet.times import rising

    assert rising([1, 2, 3]) == (1, 2, 3)
    assert rising([1, 4, 2, 5]) == (1, 3, 3, 5)
    assert rising([3, 2, 1]) == (2, 2, 2)


def test_times_are_written_and_read(script: ModuleType, times: Any, tmp_path: Path) -> None:
    times.write(tmp_path / "times.json")
    assert script.StepTimes.read(tmp_path / "times.json") == times


# `edgelm serve` with steps of known duration, independent of the machine's load.
SLOW = """
import sys, time
from edgelm.runtime.cli import main
from edgelm.runtime.sessions.rows import OrtRows
step, feed = OrtRows.step, OrtRows.feed
def slow_step(self, token_ids):
    time.sleep(0.06 + 0.01 * len(token_ids))
    return step(self, token_ids)
def slow_feed(self, row, token_ids, keep=1):
    time.sleep(0.07 if len(token_ids) == 1 else 0.06 + 0.002 * len(token_ids))
    return feed(self, row, token_ids, keep)
OrtRows.step, OrtRows.feed = slow_step, slow_feed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_real_server_agrees(script: ModuleType, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Simulated users see the same times as users who talk to the real server for a minute."""
    load = script.Load(6, prompt=40, answer=30, think_s=1.5, turns=3, preamble=60, context=400, answers_return=False)
    with serving(f"model={tiny_bundle}", "--no-response-cache", program=SLOW) as server:
        times = asyncio.run(script.measure(server.address, load.users, 256))
        real = asyncio.run(script.talk(server.address, load, 60)).figures()
    simulated = script.Fleet([times], load).run(60).figures()
    errors = {name: simulated[name] / real[name] - 1 for name in real}
    with capsys.disabled():
        print(f"\nreal {real}\nsimulated {simulated}\nerrors {errors}")
    assert real["requests"] > 30
    assert abs(errors["tokens_per_s"]) < 0.15 and abs(errors["gap_mean_ms"]) < 0.15, errors
    assert abs(errors["answer_p50_s"]) < 0.25 and abs(errors["first_token_p50_s"]) < 0.35, errors
