"""The durations of a server's steps: a few figures, measured once on the machine itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a server with one model.

    steps: a step of 1, 2, ... rows, each with `step_tokens` tokens of context; for_token: added per token of context
    beyond that, over all rows. prompt: a, b, c of a + b * n + c * n * (p + n / 2), the time to feed n tokens after p.
    request: a request's cost beside that (connection, JSON, template). piece: tokens fed at once while no other row is
    in decode; beside_rows: while one is.
    """

    steps: tuple[float, ...]
    step_tokens: int
    for_token: float
    prompt: tuple[float, float, float]
    request: float
    piece: int = 512
    beside_rows: int = 256

    @property
    def rows(self) -> int:
        """The largest number of rows in a batch."""
        return len(self.steps)

    def step(self, rows: int, tokens: int) -> float:
        """A step of so many rows with so many tokens of context together."""
        more = self.for_token * (tokens - rows * self.step_tokens)
        return max(self.steps[rows - 1] + more, self.steps[rows - 1] / 2)

    def feed(self, count: int, behind: int) -> float:
        """The time to feed some tokens of a prompt after others."""
        a, b, c = self.prompt
        return a + b * count + c * count * (behind + count / 2)

    def slower(self, factor: float) -> StepTimes:
        """A machine that takes `factor` times as long for everything."""
        return StepTimes(
            tuple(factor * item for item in self.steps),
            self.step_tokens,
            factor * self.for_token,
            (factor * self.prompt[0], factor * self.prompt[1], factor * self.prompt[2]),
            factor * self.request,
            self.piece,
            self.beside_rows,
        )

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """Read a file of `write`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "steps": tuple(data["steps"]), "prompt": tuple(data["prompt"])})


def fit_prompt(points: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Fit `StepTimes.prompt` by least squares of relative errors. points: for whole prompts, the number of pieces,
    tokens, seconds."""
    import numpy as np

    # The sum over pieces of n * (p + n / 2) is half the square of the whole.
    terms = np.array([[pieces, count, count * count / 2] for pieces, count, _ in points], float)
    seconds = np.array([item for _, _, item in points])
    found, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)
    return float(max(found[0], 0.0)), float(max(found[1], 0.0)), float(max(found[2], 0.0))


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing sequence closest to the numbers by least squares: more rows take longer, whatever noise was
    measured. Decreasing neighbours get their mean (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(sum(pool) / len(pool) for pool in pools for _ in pool)
