"""A fleet of boards behind a proxy, and its users: one queue of events. The same seed gives the same run."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from random import Random

from .board import Board, Request
from .load import Load, Turn, User
from .outcome import FILLING, Outcome
from .times import StepTimes

# How the proxy chooses a board: by a hash of the conversation, at random, or the less busy of two random ones.
POLICIES = ("session", "random", "two")


class Fleet:
    """Boards and users. Each run needs a new one."""

    def __init__(
        self,
        times: Sequence[StepTimes],
        load: Load,
        policy: str = "session",
        *,
        kept_tokens: int = 20_000,
        seed: int = 1,
    ) -> None:
        """times: of each board; kept_tokens: of texts whose prefixes a board caches."""
        assert policy in POLICIES
        self._load, self._policy = load, policy
        self._boards = [Board(item, kept_tokens) for item in times]
        self._alive = [True] * len(times)
        self._random = Random(seed)  # noqa: S311, a simulation
        self._users = [User(number, load, seed) for number in range(load.users)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._planned = [math.inf] * len(times)
        self._asked: dict[Request, int] = {}
        self._done: list[Request] = []
        self._lost = 0

    def run(self, seconds: float, *, failing: int = 0) -> Outcome:
        """Simulate. failing: so many boards fail for good at half time. Their unfinished requests are sent again at
        once, as a proxy does, and count from the first try."""
        for user in range(self._load.users):
            self._ask(user, -self._users[user].next().pause_s * self._random.random())
        if failing:
            self._at(seconds / 2, lambda now: self._fail(failing, now))
        while self._events and self._events[0][0] <= seconds:
            now, _, act = heapq.heappop(self._events)
            act(now)
        counted = [request for request in self._done if request.arrival >= seconds / FILLING]
        busy = [board.busy / seconds for board in self._boards]
        return Outcome(counted, seconds * (1 - 1 / FILLING), busy, self._lost)

    def _at(self, time: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), act))

    def _ask(self, user: int, ended: float) -> None:
        """A user reads, thinks, and asks."""
        turn = self._users[user].next()
        self._at(max(0.0, ended + turn.pause_s), lambda now: self._send(self._request(turn, now), user, now))

    def _request(self, turn: Turn, now: float) -> Request:
        return Request(turn.session, turn.prompt, turn.known, turn.answer, now)

    def _send(self, request: Request, user: int, now: float) -> None:
        index = self._choose(request.session)
        self._finish(self._boards[index].run_until(now))
        self._asked[request] = user
        self._boards[index].add(request, now)
        self._plan(index, now)

    def _plan(self, index: int, now: float) -> None:
        """Look at a board again when something may have ended, unless an earlier look is planned."""
        wakes = max(now, self._boards[index].wakes())
        if wakes < self._planned[index]:
            self._planned[index] = wakes
            self._at(wakes, lambda time: self._look(index, time))

    def _look(self, index: int, now: float) -> None:
        if now != self._planned[index]:
            return  # replaced by an earlier look
        self._planned[index] = math.inf
        self._finish(self._boards[index].run_until(math.nextafter(now, math.inf)))
        self._plan(index, now)

    def _finish(self, ended: Sequence[Request]) -> None:
        for request in ended:
            self._done.append(request)
            self._ask(self._asked.pop(request), request.end)

    def _fail(self, count: int, now: float) -> None:
        """The first boards fail."""
        for index in range(count):
            self._alive[index] = False
        for index in range(count):
            for lost in self._boards[index].lose():
                self._lost += 1
                again = Request(lost.session, lost.prompt, lost.known, lost.answer, lost.arrival)
                self._send(again, self._asked.pop(lost), now)

    def _choose(self, session: int) -> int:
        if self._policy == "session":
            # Conversations of a failed board move to others; the rest stay, as with consistent hashing.
            places = (hash((session, salt)) % len(self._boards) for salt in itertools.count())
            return next(place for place in places if self._alive[place])
        if self._policy == "random":
            return self._drawn()
        return min(self._drawn(), self._drawn(), key=lambda index: len(self._boards[index]))

    def _drawn(self) -> int:
        while True:
            index = self._random.randrange(len(self._boards))
            if self._alive[index]:
                return index
