"""The results of a run, simulated or real: rates, times to the first token, times between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .board import Request

FILLING = 5  # requests in the first fifth of the time, while the fleet fills, do not count


@dataclass
class Outcome:
    """requests: those that count; seconds: the time in which they ended; busy: the share of computing time, by board;
    lost: requests whose board failed."""

    requests: list[Request]
    seconds: float
    busy: list[float] = field(default_factory=list)
    lost: int = 0

    def tokens_per_s(self) -> float:
        """Tokens of all answers, per second."""
        return sum(request.answer for request in self.requests) / self.seconds

    def first_s(self, share: float) -> float:
        """The quantile of times to the first token at this share of requests."""
        return quantile([(request.first - request.arrival, 1) for request in self.requests], share)

    def gap_s(self, share: float) -> float:
        """The same for the time between two tokens."""
        return quantile([gap for request in self.requests for gap in request.gaps], share)

    def whole_s(self, share: float) -> float:
        """The same for the time to an answer's end."""
        return quantile([(request.end - request.arrival, 1) for request in self.requests], share)

    def figures(self) -> dict[str, float]:
        """The main figures."""
        return {
            "requests": len(self.requests),
            "tokens_per_s": round(self.tokens_per_s(), 1),
            "first_token_p50_s": round(self.first_s(0.5), 3),
            "first_token_p95_s": round(self.first_s(0.95), 3),
            "gap_mean_ms": round(1000 * self.mean_gap_s(), 1),
            "gap_p95_ms": round(1000 * self.gap_s(0.95), 1),
            "answer_p50_s": round(self.whole_s(0.5), 2),
            "answer_p95_s": round(self.whole_s(0.95), 2),
        }

    def mean_gap_s(self) -> float:
        """The mean time between two tokens."""
        gaps = [gap for request in self.requests for gap in request.gaps]
        return sum(value * count for value, count in gaps) / max(1, sum(count for _, count in gaps))


def quantile(values: Sequence[tuple[float, int]], share: float) -> float:
    """The quantile of values with counts; NaN without values."""
    ordered = sorted(values)
    wanted, seen = share * sum(count for _, count in ordered), 0
    for value, count in ordered:
        seen += count
        if seen >= wanted:
            return value
    return math.nan
