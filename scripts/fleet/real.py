"""The real server: its step times, and users who talk with it, for comparison with the simulation."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from .board import Request
from .load import Load, User
from .outcome import FILLING, Outcome
from .times import StepTimes, fit_prompt, rising

_TIMEOUT_S = 300.0
_SHORT, _LONG = 96, 1500
_ANSWER = 48
_ROUNDS = 2
_PROMPTS = (16, 64, 160, 256, 512, 1024, 1800)


@dataclass
class Answer:
    """One stream: the times of the request and of each token, in seconds."""

    asked: float
    times: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Client:
    """Asks one server for answers of a fixed length to prompts of random tokens."""

    def __init__(self, address: str, seed: int = 1) -> None:
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(base_url=address, timeout=_TIMEOUT_S, limits=limits)
        self._random = Random(seed)  # noqa: S311, to make runs repeatable
        self._vocabulary = range(0)
        self.context = 0

    async def __aenter__(self) -> Client:
        await self._client.__aenter__()
        model = (await self._client.get("/v1/models")).json()["data"][0]
        size, self.context = model["meta"]["n_vocab"], model["context_length"]
        self._vocabulary = range(size // 8, size // 2)  # in most vocabularies, no special tokens
        await self.ask(self.words(8), 2)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.__aexit__(*error)

    def words(self, count: int) -> list[int]:
        """Random tokens."""
        return self._random.choices(self._vocabulary, k=count)

    async def ask(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Ask for a sampled answer with a new seed, so that nothing repeats and nothing is in the response cache."""
        settings = {"temperature": 1, "seed": self._random.randrange(1 << 30), "stream": True}
        body = {"prompt": list(prompt), "max_tokens": tokens, "min_tokens": tokens, "logprobs": 0, **settings}
        answer = Answer(time.perf_counter())
        async with self._client.stream("POST", "/v1/completions", json=body) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    now, chunk = time.perf_counter(), json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise SystemExit(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        answer.times += [now] * len((choice["logprobs"] or {"tokens": []})["tokens"])
        return answer

    async def request_s(self) -> float:
        """The time of a request without the model: one that only counts tokens."""
        taken = []
        for _ in range(20):
            begun = time.perf_counter()
            await self._client.post("/tokenize", json={"content": "word " * 50})
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)


async def measure(address: str, rows: int, piece: int) -> StepTimes:
    """The figures of a server without caches. rows: its largest batch; piece: tokens of a prompt fed in one step."""
    async with Client(address) as client:
        rounds: list[list[float]] = []
        for _ in range(_ROUNDS):
            rounds.append([])
            for count in range(1, rows + 1):
                answers = await asyncio.gather(*(client.ask(client.words(_SHORT), _ANSWER) for _ in range(count)))
                rounds[-1].append(_together(answers))
        steps = rising([statistics.mean(item) for item in zip(*rounds, strict=True)])
        longest = min(_LONG, client.context - _ANSWER)
        long = statistics.mean((await client.ask(client.words(longest), _ANSWER)).gaps)
        points = []
        for length in (item for item in _PROMPTS if item < client.context):
            tries = [await client.ask(client.words(length), 1) for _ in range(3)]
            points.append(
                (-(-length // piece), length, statistics.median(item.times[0] - item.asked for item in tries))
            )
        request = await client.request_s()
    prompt = fit_prompt([(pieces, length, seconds - request) for pieces, length, seconds in points])
    tokens = _SHORT + _ANSWER // 2
    slope = max(0.0, (long - steps[0]) / (longest - _SHORT))
    return StepTimes(steps, tokens, slope, prompt, request, piece)


def _together(answers: Sequence[Answer]) -> float:
    """The mean time between tokens while all of these answers are streamed, including other load on the machine."""
    begin, end = max(item.times[0] for item in answers), min(item.times[-1] for item in answers)
    gaps = [
        after - before
        for item in answers
        for before, after in zip(item.times, item.times[1:], strict=False)
        if begin <= before and after <= end
    ]
    return statistics.mean(gaps)


async def talk(address: str, load: Load, seconds: float, seed: int = 1) -> Outcome:
    """Run users for some time, with the same turns as a simulation with this seed."""
    done: list[Request] = []
    async with Client(address, seed) as client:
        begun = time.perf_counter()
        users = [
            asyncio.create_task(_talk(client, number, User(number, load, seed), done)) for number in range(load.users)
        ]
        await asyncio.sleep(seconds)
        for user in users:
            user.cancel()
        await asyncio.gather(*users, return_exceptions=True)
    for request in done:
        request.arrival, request.first, request.end = (
            moment - begun for moment in (request.arrival, request.first, request.end)
        )
    counted = [request for request in done if request.arrival >= seconds / FILLING]
    return Outcome(counted, seconds * (1 - 1 / FILLING))


async def _talk(client: Client, number: int, user: User, done: list[Request]) -> None:
    """One user, forever."""
    session, text = -1, list[int]()
    pause = user.next().pause_s * Random(number).random()  # noqa: S311, users begin at different times
    while True:
        turn = user.next()
        await asyncio.sleep(turn.pause_s if session >= 0 else pause)
        text = [] if turn.session != session else text
        session = turn.session
        text += client.words(turn.prompt - len(text))
        answer = await client.ask(text, turn.answer)
        request = Request(turn.session, turn.prompt, turn.known, turn.answer, answer.asked)
        request.first, request.end = answer.times[0], answer.times[-1]
        request.gaps = [(gap, 1) for gap in answer.gaps]
        done.append(request)
