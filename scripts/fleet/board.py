"""A server as a discrete-event model: a queue, rows, steps, and prompts fed between them, like the runtime's decoder.

Steps in which rows only get their next token are simulated together, so an answer costs a few events instead of one per
token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from .times import StepTimes

# As in runtime/serving/scheduler.py and runtime/decoding/decoder.py.
_MOST_OVERTAKINGS = 4
_COST_OF_A_RUN = 32


@dataclass(eq=False)
class Request:
    """One request. prompt: its tokens; known: how many of them its session sent or received before; answer: tokens of
    the answer. Times in seconds: arrival, first (token), end; gaps: durations between two tokens, with their counts."""

    session: int
    prompt: int
    known: int
    answer: int
    arrival: float
    first: float = math.nan
    end: float = math.nan
    board: int = -1
    fed: int = 0
    said: int = 0
    passed_over: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The tokens that its row holds."""
        return self.fed + max(self.said - 1, 0)


class Board:
    """One server. `run_until` simulates up to a time, `add` takes a request that arrives then, `wakes` returns the time
    of the next event."""

    def __init__(self, times: StepTimes, kept_tokens: int) -> None:
        """kept_tokens: of texts whose prefixes are cached for later turns."""
        self.times = times
        self.clock = 0.0
        self.busy = 0.0
        self._waiting: list[Request] = []
        self._unfed: list[Request] = []
        self._fed: list[Request] = []
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._room = kept_tokens

    def __len__(self) -> int:
        """The number of running and waiting requests."""
        return len(self._waiting) + len(self._unfed) + len(self._fed)

    def add(self, request: Request, now: float) -> None:
        """Take a request. The board must have been simulated up to now."""
        if not len(self):
            self.clock = max(self.clock, now)
        self._waiting.append(request)

    def lose(self) -> list[Request]:
        """Fail the board, with its cached prefixes; returns all its requests."""
        lost = [*self._waiting, *self._unfed, *self._fed]
        self._waiting, self._unfed, self._fed = [], [], []
        self._kept.clear()
        return lost

    def wakes(self) -> float:
        """The time by which something ends, as known now; infinite for an idle board."""
        if self._unfed or (self._waiting and len(self._fed) < self.times.rows):
            return self.clock
        if not self._fed:
            return math.inf
        steps = min(request.answer - request.said for request in self._fed)
        return self.clock + steps * self.times.step(len(self._fed), self._tokens())

    def run_until(self, now: float) -> list[Request]:
        """Compute the steps that begin before a time. Returns the requests that ended."""
        ended: list[Request] = []
        while len(self) and self.clock < now:
            began = self.clock
            self._admit()
            if self._unfed:
                ended += self._step_and_feed()
            else:
                seconds = self.times.step(len(self._fed), self._tokens())
                least = min(request.answer - request.said for request in self._fed)
                enough = (now - self.clock) / seconds
                ended += self._steps(least if least <= enough else math.ceil(enough), seconds)
            self.busy += self.clock - began
        return ended

    def _tokens(self) -> int:
        return sum(request.tokens for request in self._fed)

    def _admit(self) -> None:
        while self._waiting and len(self._unfed) + len(self._fed) < self.times.rows:
            chosen = min(self._waiting, key=lambda item: (item.passed_over < _MOST_OVERTAKINGS, item.prompt))
            for earlier in self._waiting[: self._waiting.index(chosen)]:
                earlier.passed_over += 1
            self._waiting.remove(chosen)
            held = self._kept.pop(chosen.session, 0)
            chosen.fed = min(held, chosen.known, chosen.prompt - 1)
            chosen.passed_over = 0
            self.clock += self.times.request
            self._unfed.append(chosen)

    def _step_and_feed(self) -> list[Request]:
        """A step for the rows in decode, then pieces of prompts. The step's tokens arrive when both are done."""
        stepped = list(self._fed)
        seconds = self.times.step(len(stepped), self._tokens()) if stepped else 0.0
        budget = min(self.times.piece, self.times.beside_rows) if stepped else self.times.piece
        begun = []
        while budget > 0 and self._unfed:
            chosen = min(self._unfed, key=lambda item: (item.passed_over < _MOST_OVERTAKINGS, item.prompt - item.fed))
            for other in self._unfed:
                if other is not chosen and other.prompt - other.fed > chosen.prompt - chosen.fed:
                    other.passed_over += 1
            count = min(budget, chosen.prompt - chosen.fed)
            budget -= max(count, _COST_OF_A_RUN)
            seconds += self.times.feed(count, chosen.fed)
            chosen.fed += count
            if chosen.fed == chosen.prompt:
                self._unfed.remove(chosen)
                begun.append((chosen, self.clock + seconds))
        ended = self._steps(1, seconds) if stepped else []
        self.clock += 0.0 if stepped else seconds
        for request, first in begun:
            request.first, request.said = first, 1
            self._fed.append(request)
        return [*ended, *self._ended()]

    def _steps(self, count: int, seconds: float) -> list[Request]:
        """Some equal steps of all rows in decode."""
        self.clock += count * seconds
        for request in self._fed:
            request.said += count
            request.gaps.append((seconds, count))
        return self._ended()

    def _ended(self) -> list[Request]:
        over = [request for request in self._fed if request.said >= request.answer]
        for request in over:
            self._fed.remove(request)
            request.end = self.clock
            self._keep(request)
        return over

    def _keep(self, request: Request) -> None:
        self._kept[request.session] = request.tokens
        while sum(self._kept.values()) > self._room:
            self._kept.popitem(last=False)
