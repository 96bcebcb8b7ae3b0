"""How long a server's steps take: a few figures that are measured once, on the machine itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a server with one model.

    steps: of a step of 1, 2, ... rows, each with `step_tokens` tokens of context; for_token: more for each token of
    context beyond that, of all rows together. prompt: a, b, c of a + b * n + c * n * (p + n / 2), the time to feed n
    tokens behind p. request: what a request costs beside that (connection, JSON, template). piece: tokens that are fed
    at once where nobody else is answered; beside_rows: where somebody is.
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
        """The most rows that run at once."""
        return len(self.steps)

    def step(self, rows: int, tokens: int) -> float:
        """A step of so many rows, which have so many tokens of context together."""
        more = self.for_token * (tokens - rows * self.step_tokens)
        return max(self.steps[rows - 1] + more, self.steps[rows - 1] / 2)

    def feed(self, count: int, behind: int) -> float:
        """Feeding some tokens of a prompt behind others."""
        a, b, c = self.prompt
        return a + b * count + c * count * (behind + count / 2)

    def slower(self, factor: float) -> StepTimes:
        """A machine on which everything takes `factor` times as long."""
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
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """What `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "steps": tuple(data["steps"]), "prompt": tuple(data["prompt"])})


def fit_prompt(points: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """The figures of `StepTimes.prompt` by least squares of relative errors. points: of whole prompts, the pieces in
    which they were fed, tokens, seconds."""
    import numpy as np

    # The sum over pieces of n * (p + n / 2) is half of the whole's square.
    terms = np.array([[pieces, count, count * count / 2] for pieces, count, _ in points], float)
    seconds = np.array([item for _, _, item in points])
    found, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)
    return float(max(found[0], 0.0)), float(max(found[1], 0.0)), float(max(found[2], 0.0))


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The rising sequence that is nearest to the numbers by least squares, because more rows take longer, whatever
    noise was measured. Neighbours that fall get their mean (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(sum(pool) / len(pool) for pool in pools for _ in pool)
