"""Test a server with thousands of mixed requests from several clients that often disconnect, and with kills.

    python scripts/soak_server.py BUNDLE [--requests 10000] [--clients 8] [--kills 50] [--seed 1] [--threads 1]

Each answer is compared with that of `generate`. At the end no request may be running, and memory, threads and open
files of the last server must not have grown. Prints a summary as JSON; exit status 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from edgelm.runtime import load

PROMPTS = [
    f"{begin} {middle}" for begin in ("Once upon a time", "The old man", "A cat") for middle in ("was", "and a", "")
]
START_S, TIMEOUT_S = 120.0, 120.0
LEAVES = 0.3  # the share of streams that are abandoned


@dataclass
class Soak:
    """The requests, and their results."""

    arguments: argparse.Namespace
    expected: dict[tuple[str, int], str]
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    address: str = ""


def main() -> int:
    """Run the test."""
    arguments = parse()
    soak = Soak(arguments, expected_texts(arguments), random.Random(arguments.seed))  # noqa: S311, to make runs repeatable
    begun = time.perf_counter()
    start(soak)
    try:
        asyncio.run(wear(soak))
        settled = asyncio.run(idle(soak))
        soak.samples.append(sample(soak))
    finally:
        assert soak.process is not None
        soak.process.terminate()
        soak.process.wait(START_S)
    grown = growth(soak.samples)
    figures = {
        "seconds": round(time.perf_counter() - begun),
        "counts": dict(soak.counts),
        "wrong": soak.wrong[:10],
        "idle_at_the_end": settled,
        "memory_MB": [round(item[0] / 1e6, 1) for item in soak.samples],
        "threads": [item[1] for item in soak.samples],
        "files": [item[2] for item in soak.samples],
        "memory_growth_percent": grown,
    }
    print(json.dumps(figures))
    return 0 if not soak.wrong and settled and grown < arguments.most_growth_percent else 1


def parse() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=50, help="kills of the server, in the first half of the requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-growth-percent", type=float, default=5.0)
    return parser.parse_args()


def expected_texts(arguments: argparse.Namespace) -> dict[tuple[str, int], str]:
    """The texts of `generate`, by prompt and number of tokens."""
    with load(arguments.bundle, threads=arguments.threads, response_cache=False, prefix_cache=False) as engine:
        return {
            (prompt, count): engine.generate(prompt, max_tokens=count).text
            for prompt in PROMPTS
            for count in (4, 16, 40)
        }


def start(soak: Soak) -> None:
    """Start the server and wait until it is ready."""
    command = [sys.executable, "-m", "edgelm.runtime.cli", "serve", f"model={soak.arguments.bundle}", "--port", "0"]
    soak.process = subprocess.Popen(
        [*command, "--threads", str(soak.arguments.threads)], stdout=subprocess.PIPE, text=True
    )
    assert soak.process.stdout is not None
    for line in soak.process.stdout:
        found = re.search(r"interface at (\S+)/v1", line)
        if found:
            soak.address = found[1]
            return
    raise SystemExit("the server did not start")


async def wear(soak: Soak) -> None:
    """Send all requests, in rounds; between them the server may be killed."""
    rounds = max(2 * soak.arguments.kills, 20)
    each = max(1, soak.arguments.requests // rounds)
    for number in range(rounds):
        kill = number < soak.arguments.kills
        await round_of_requests(soak, each, kill)
        if kill:
            soak.counts["kills"] += 1
            soak.samples.clear()
            start(soak)
        elif number % max(1, rounds // 16) == 0:
            soak.samples.append(sample(soak))


async def round_of_requests(soak: Soak, count: int, kill: bool) -> None:
    """Send some requests at once; the server may be killed meanwhile."""
    places = asyncio.Semaphore(soak.arguments.clients)
    done = 0

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal done
        async with places:
            try:
                await soak.random.choice(KINDS)(soak, client)
            except httpx.HTTPError:
                if not kill:
                    soak.wrong.append("a connection failed")
                soak.counts["cut"] += 1
            done += 1
            if kill and done == count // 2:
                assert soak.process is not None
                soak.process.kill()
                soak.process.wait()

    async with httpx.AsyncClient(base_url=soak.address, timeout=TIMEOUT_S) as client:
        await asyncio.gather(*(one(client) for _ in range(count)))


async def completion(soak: Soak, client: httpx.AsyncClient) -> None:
    """A text, continued in one piece."""
    prompt, count = soak.random.choice(list(soak.expected))
    answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": count})
    check(soak, "completion", answer.status_code == 200 and text_of(answer.json()) == soak.expected[prompt, count])


async def stream(soak: Soak, client: httpx.AsyncClient) -> None:
    """A text continued in chunks, often abandoned on the way."""
    prompt, count = soak.random.choice(list(soak.expected))
    body = {"prompt": prompt, "max_tokens": count, "stream": True}
    leave_after = soak.random.randrange(6) if soak.random.random() < LEAVES else None
    text, seen = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += text_of(json.loads(line.removeprefix("data: ")))
                seen += 1
            if leave_after is not None and seen > leave_after:
                check(soak, "left", soak.expected[prompt, count].startswith(text))
                return
    check(soak, "stream", text == soak.expected[prompt, count])


async def drawn(soak: Soak, client: httpx.AsyncClient) -> None:
    """Several sampled answers, twice."""
    body = {"prompt": soak.random.choice(PROMPTS), "max_tokens": 12, "temperature": 1.0, "n": 2}
    body["seed"] = soak.random.randrange(50)
    answers = [await client.post("/v1/completions", json=body) for _ in range(2)]
    check(soak, "drawn", answers[0].json()["choices"] == answers[1].json()["choices"])


async def schema(soak: Soak, client: httpx.AsyncClient) -> None:
    """JSON by a schema."""
    form = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": form}}
    body = {"prompt": "Once", "max_tokens": 60, "response_format": asked}
    answer = await client.post("/v1/completions", json=body)
    check(soak, "schema", json.loads(text_of(answer.json()))["n"] in (1, 2))


async def error(soak: Soak, client: httpx.AsyncClient) -> None:
    """A request that must be refused."""
    bodies: list[Any] = [{"prompt": 5}, {"prompt": "x " * 20_000}, {"prompt": "a", "model": "none"}, [], {"n": 99}]
    answer = await client.post("/v1/completions", json=soak.random.choice(bodies))
    check(soak, "error", answer.status_code in (400, 404) and bool(answer.json()["error"]["message"]))


async def other(soak: Soak, client: httpx.AsyncClient) -> None:
    """Tokens, models and metrics."""
    counted = await client.post("/tokenize", json={"content": "Once upon a time"})
    found = await client.get(soak.random.choice(["/v1/models", "/metrics", "/health", "/"]))
    check(soak, "other", counted.json()["count"] > 0 and found.status_code == 200)


KINDS: list[Callable[[Soak, httpx.AsyncClient], Awaitable[None]]] = [
    completion, stream, stream, stream, drawn, schema, error, other,
]  # fmt: skip


def check(soak: Soak, kind: str, right: bool) -> None:
    """Count a request."""
    soak.counts[kind] += 1
    if not right:
        soak.wrong.append(kind)


def text_of(body: dict[str, Any]) -> str:
    """The text of the first choice."""
    return str(body["choices"][0]["text"]) if body["choices"] else ""


async def idle(soak: Soak) -> bool:
    """Return whether all requests end soon."""
    async with httpx.AsyncClient(base_url=soak.address) as client:
        for _ in range(100):
            if 'requests_processing{model="model"} 0' in (await client.get("/metrics")).text:
                return True
            await asyncio.sleep(0.1)
    return False


def sample(soak: Soak) -> tuple[int, int, int]:
    """The server's own memory in bytes, its threads and open files."""
    assert soak.process is not None
    process = psutil.Process(soak.process.pid)
    return process.memory_full_info().uss, process.num_threads(), process.num_fds()


def growth(samples: list[tuple[int, int, int]]) -> float:
    """How much more memory the last samples have than the second quarter's, in percent."""
    if len(samples) < 8:
        return 0.0
    quarter = len(samples) // 4
    before = sum(item[0] for item in samples[quarter : 2 * quarter]) / quarter
    after = sum(item[0] for item in samples[-quarter:]) / quarter
    return round(100 * (after / before - 1), 2)


if __name__ == "__main__":
    raise SystemExit(main())
