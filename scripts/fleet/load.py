"""Users who talk with a fleet: each asks, reads the answer, thinks, and asks again with the conversation so far."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Load:
    """The behaviour of users. prompt: tokens that a turn adds; answer: tokens of an answer; think_s: from an answer's
    end to the next question; all three are means of exponential distributions, cut at four times the mean. turns: of a
    conversation; after these, or with a full context, the next one begins, with `preamble` more tokens. answers_return:
    the next prompt contains the answers too, not only the questions."""

    users: int
    prompt: float = 60.0
    answer: float = 120.0
    think_s: float = 20.0
    turns: int = 6
    preamble: int = 40
    context: int = 2000
    answers_return: bool = True


@dataclass(frozen=True)
class Turn:
    """One question of a user: all tokens of its prompt, how many of them were sent before, the answer's tokens, and the
    pause before it, in seconds."""

    session: int
    prompt: int
    known: int
    answer: int
    pause_s: float


class User:
    """The endless turns of one user, determined by number, load and seed."""

    def __init__(self, number: int, load: Load, seed: int) -> None:
        self._random = Random(f"{seed} {number}")  # noqa: S311, a simulation
        self._load = load
        self._sessions = itertools.count(number, load.users)
        self._session, self._turns, self._said = -1, 0, 0

    def next(self) -> Turn:
        """The next turn."""
        load = self._load
        new, answer = self._drawn(load.prompt), self._drawn(load.answer)
        if self._session < 0 or self._turns == load.turns or self._said + new + answer > load.context:
            self._session, self._turns, self._said = next(self._sessions), 0, 0
            new += load.preamble
        known, prompt = self._said, self._said + new
        self._turns += 1
        self._said = prompt + (answer if load.answers_return else 0)
        pause = min(self._random.expovariate(1 / load.think_s), 4 * load.think_s)
        return Turn(self._session, prompt, known, answer, pause)

    def _drawn(self, mean: float) -> int:
        return max(4, round(min(self._random.expovariate(1 / mean), 4 * mean)))
