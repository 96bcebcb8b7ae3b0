"""Measure a server with one client and several: tokens per second, time between tokens, gaps beside a long prompt.

    python scripts/bench_server.py BUNDLE [--clients 8] [--tokens 96] [--threads N] [--json]
    python scripts/bench_server.py BUNDLE --beside "llama-server -m FILE.gguf -np 8 -t 2 --port {port}" [--rounds 3]

Starts `edgelm serve` without the response cache. Measures the time from process start to the first token, then one
client, several at once, and several while a long prompt is fed. Texts are compared with those of `generate`.

--beside compares, in alternation, with another server of OpenAI's interface, started by this command: tokens of all
clients per second, and per second of CPU time, which is less disturbed by other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from edgelm.runtime import load

WORDS = "The river runs past the old mill, and the children of the village play there until it is dark. "
SUBJECTS = ("a lake", "a fox", "the moon", "bread", "a train", "snow", "a library", "tea", "a kite", "the sea")
START_S = 120.0
WITHOUT_CACHES = ("--no-response-cache", "--no-prefix-cache")


@dataclass(frozen=True)
class Stream:
    """One answer: the time of each chunk with text, in seconds, and the text."""

    times: list[float]
    text: str
    tokens: int

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def main() -> int:
    """Measure and print."""
    arguments = parse()
    if arguments.beside:
        print(json.dumps(beside_peer(arguments), indent=None if arguments.json else 1))
        return 0
    with served(arguments.bundle, arguments.threads) as (address, begun):
        first = asyncio.run(ask(address, "Once", 1)).times[0] - begun
        figures = {"start_to_first_token_s": round(first, 3), **asyncio.run(measure(address, arguments))}
    figures["texts_are_those_of_generate"] = compare(arguments, figures.pop("texts"))
    print(json.dumps(figures, indent=None if arguments.json else 1))
    return 0 if figures["texts_are_those_of_generate"] else 1


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=1900, help="tokens of the long prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--beside", metavar="COMMAND", help="compare with another server; {port} is its port")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison")
    return parser.parse_args()


def beside_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all clients, of edgelm and of the other server, and the medians of the ratios."""
    ours, theirs = [], []
    with served(arguments.bundle, arguments.threads) as (address, _), peer(arguments.beside) as (other, process):
        (server,) = (child for child in psutil.Process().children() if child.pid != process.pid)
        for where in (address, other):
            asyncio.run(ask(where, "warm up", 8))
        for number in range(arguments.rounds):
            ours.append(asyncio.run(rates(address, server, arguments, number)))
            theirs.append(asyncio.run(rates(other, process, arguments, number)))
    ratios = {
        name: round(statistics.median(mine[name] / other[name] for mine, other in zip(ours, theirs, strict=True)), 2)
        for name in ours[0]
    }
    return {"edgelm": ours, "peer": theirs, "ratio": ratios}


@contextmanager
def peer(command: str) -> Iterator[tuple[str, psutil.Popen]]:
    """The other server's address and process, once it answers at /health."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.format(port=port))
    try:
        process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise SystemExit(f"{words[0]} cannot be started: {error.strerror}") from None
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not is_healthy(address):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"this server did not start: {command}")
            time.sleep(0.1)
        yield address, process
    finally:
        process.terminate()
        process.wait(START_S)


def is_healthy(address: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"{address}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def rates(address: str, server: psutil.Process, arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """Tokens per second of all clients together, and per second of the server's CPU time."""
    prompts = [f"Tell me about the number {100 * number + client} and others." for client in range(arguments.clients)]
    wall, cpu = time.perf_counter(), sum(server.cpu_times()[:2])
    answers = await asyncio.gather(*(ask(address, prompt, arguments.tokens) for prompt in prompts))
    count = sum(answer.tokens for answer in answers)
    taken = {"per_s": time.perf_counter() - wall, "per_cpu_s": sum(server.cpu_times()[:2]) - cpu}
    return {f"tokens_{name}": round(count / seconds, 1) for name, seconds in taken.items()}


@contextmanager
def served(bundle: str, threads: int, options: Sequence[str] = WITHOUT_CACHES) -> Iterator[tuple[str, float]]:
    """A server's address and the start time of its process."""
    begun = time.perf_counter()
    where = ["--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelm.runtime.cli", "serve", f"model={bundle}", *where, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"interface at (\S+)/v1", line)
            if found:
                yield found[1], begun
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(START_S)


async def measure(address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures except the start."""
    prompts = [f"Tell me about {SUBJECTS[number % len(SUBJECTS)]} ({number})." for number in range(arguments.clients)]
    await ask(address, "warm up", 8)
    alone = await ask(address, prompts[0], arguments.tokens)
    begun = time.perf_counter()
    together = await asyncio.gather(*(ask(address, prompt, arguments.tokens) for prompt in prompts))
    took = time.perf_counter() - begun
    long = await beside_long_prompt(address, prompts[: max(1, arguments.clients // 2)], arguments)
    lone_rate = (len(alone.times) - 1) / (alone.times[-1] - alone.times[0])
    total = sum(item.tokens for item in together) / took
    return {
        "clients": arguments.clients,
        "one_client_tokens_per_s": round(lone_rate, 1),
        "all_clients_tokens_per_s": round(total, 1),
        "ratio": round(total / lone_rate, 2),
        "one_client_p95_gap_ms": p95(alone.gaps),
        "all_clients_p95_gap_ms": p95([gap for item in together for gap in item.gaps]),
        "longest_silence_beside_a_long_prompt_ms": long,
        "texts": {prompt: item.text for prompt, item in zip(prompts, together, strict=True)},
    }


async def beside_long_prompt(address: str, prompts: list[str], arguments: argparse.Namespace) -> float:
    """The longest gap in a stream while a long prompt is fed, in ms."""
    streams = [asyncio.create_task(ask(address, prompt + " Please.", 2 * arguments.tokens)) for prompt in prompts]
    await asyncio.sleep(1.0)
    count = await tokens_of(address, WORDS)
    await ask(address, WORDS * (arguments.prompt_tokens // count), 1)
    return round(1000 * max(max(item.gaps) for item in await asyncio.gather(*streams)), 1)


async def tokens_of(address: str, text: str) -> int:
    """The number of tokens in a text."""
    async with httpx.AsyncClient(timeout=START_S) as client:
        return int((await client.post(f"{address}/tokenize", json={"content": text})).json()["count"])


async def ask(address: str, prompt: str, tokens: int, session: str = "") -> Stream:
    """Stream an answer to a text. session: a proxy may choose the server by it."""
    # Raw text would make a chat model end at once. llama-server has ignore_eos in place of min_tokens.
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, text, count = [], "", 0
    async with (
        httpx.AsyncClient(timeout=START_S) as client,
        client.stream("POST", f"{address}/v1/completions", json=body, headers={"X-Session": session}) as answer,
    ):
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
            if chunk["choices"] and chunk["choices"][0]["text"]:
                text += chunk["choices"][0]["text"]
                times.append(time.perf_counter())
    return Stream(times, text, count)


def p95(gaps: list[float]) -> float:
    """The 95th percentile, in ms."""
    return round(1000 * statistics.quantiles(gaps, n=20)[-1], 1)


def compare(arguments: argparse.Namespace, texts: dict[str, str]) -> bool:
    """Return whether `generate` gives the same texts."""
    with load(arguments.bundle, threads=arguments.threads, response_cache=False, prefix_cache=False) as engine:
        asked = {"max_tokens": arguments.tokens, "min_tokens": arguments.tokens}
        return all(engine.generate(prompt, **asked).text == text for prompt, text in texts.items())


if __name__ == "__main__":
    raise SystemExit(main())
