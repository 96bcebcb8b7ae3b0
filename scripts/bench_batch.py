"""Measure batches of prompts: tokens per second of 4, 8 and 12 prompts at once against one, with equal answers.

    python scripts/bench_batch.py [--work build/bench] [--rounds 5] [--rows 4 8 12] [--kv int8] [--threads 2]
        [--json FILE]

Uses the reference model of `scripts/bench.py` and builds it if it is missing. Each round answers the same prompts of
different lengths one by one with `generate`, then as one batch of each size, and compares all texts and tokens. Prints
medians and the medians of each round's ratio. Decoding is counted from each answer's first token; for a batch, it is
the tokens of all common steps over their time. "whole" includes feeding the prompts. Batches on a float32 cache need
the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reference_model import prepare

from edgelm.runtime import Completion, Engine, load
from edgelm.runtime.sessions.rows import OrtRows

ANSWER_TOKENS = 64
LENGTHS = (32, 16, 64, 24, 48, 8, 40, 128)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder of model and bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument(
        "--kv", default="int8", choices=("int8", "float32"), help="KV cache of the bundle (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    bundle = arguments.work / f"bundle-{arguments.kv}"
    prepare(arguments.work / "model", bundle, arguments.kv)
    with load(bundle, threads=arguments.threads, response_cache=False) as engine:
        rounds = []
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            rounds.append(measure(engine, arguments.rows, number))
    report = summarize(rounds)
    print(f"{'rows':>4}{'decode tok/s':>14}{'ratio':>8}{'whole tok/s':>14}{'ratio':>8}")
    for rows, figures in report.items():
        print(f"{rows:>4}" + "".join(f"{figures[key]:>{width}.2f}" for key, width in _COLUMNS.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


_COLUMNS = {"decode": 14, "decode_ratio": 8, "whole": 14, "whole_ratio": 8}


def measure(engine: Engine, sizes: Sequence[int], seed: int) -> dict[int, dict[str, float]]:
    """Tokens per second in one round, by number of rows; 1 is `generate`."""
    prompts = [prompt_of(LENGTHS[index % len(LENGTHS)], seed * 100 + index) for index in range(max(sizes))]
    one, alone = one_by_one(engine, prompts)
    figures = {1: one}
    for rows in sizes:
        figures[rows], together = in_batch(engine, prompts[:rows], rows)
        for done, expected in zip(together, alone, strict=False):
            if (done.text, done.token_ids) != (expected.text, expected.token_ids):
                raise SystemExit("a prompt was answered differently in the batch")
    return figures


def one_by_one(engine: Engine, prompts: Sequence[list[int]]) -> tuple[dict[str, float], list[Completion]]:
    """Each prompt by itself, with nothing reused."""
    started = time.perf_counter()
    done = [engine.generate(token_ids=ids, max_tokens=ANSWER_TOKENS) for ids in prompts]
    seconds = time.perf_counter() - started
    assert not any(one.stats.reused_tokens for one in done)
    tokens = sum(one.stats.generated_tokens for one in done)
    decode = statistics.median(one.stats.decode_tokens_per_s for one in done)
    return {"decode": decode, "whole": tokens / seconds}, done


def in_batch(engine: Engine, prompts: Sequence[list[int]], rows: int) -> tuple[dict[str, float], list[Completion]]:
    """All prompts in one batch."""
    steps: list[tuple[int, float]] = []
    original: Callable[..., Any] = OrtRows.step
    ends = [0.0]

    def timed(self: OrtRows, token_ids: Sequence[int]) -> Any:
        # From the end of the last step, so that choosing tokens and text count. Before the first step, a prompt was
        # fed.
        started = ends[0] or time.perf_counter()
        logits = original(self, token_ids)
        ends[0] = time.perf_counter()
        steps.append((len(token_ids), ends[0] - started))
        return logits

    OrtRows.step = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        done = engine.generate_batch(prompts, max_rows=rows, max_tokens=ANSWER_TOKENS)
    finally:
        OrtRows.step = original  # type: ignore[method-assign]
    seconds = time.perf_counter() - started
    tokens = sum(one.stats.generated_tokens for one in done)
    decode = sum(count for count, _ in steps) / sum(taken for _, taken in steps)
    return {"decode": decode, "whole": tokens / seconds}, done


def prompt_of(length: int, seed: int) -> list[int]:
    """Ids of a prompt with a unique first token, so that nothing is reused."""
    return [50 + seed, *((1000 + 7 * (seed + index)) % 40_000 for index in range(length - 1))]


def summarize(rounds: Sequence[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """Medians, and the medians of each round's ratio to one row."""
    report: dict[int, dict[str, float]] = {}
    for rows in rounds[0]:
        report[rows] = {}
        for key in ("decode", "whole"):
            report[rows][key] = statistics.median(one[rows][key] for one in rounds)
            report[rows][f"{key}_ratio"] = statistics.median(one[rows][key] / one[1][key] for one in rounds)
    return report


if __name__ == "__main__":
    main()
