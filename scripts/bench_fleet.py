"""Measure the benefit and cost of more processes and proxies on one machine, in alternation.

    python scripts/bench_fleet.py BUNDLE [--rounds 5] [--clients 8] [--tokens 64] [--threads 2] [--json]

Compares one server with all threads to three with a thread each behind HAProxy, as in docs/fleet.md: tokens per second
of all clients, and tokens per second of CPU time, which is less disturbed by other programs. Then it measures a request
for a cached answer, directly and through HAProxy and LiteLLM's proxy: its duration, and the proxy's CPU time. Programs
that are not installed are left out, with a message.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_server import WITHOUT_CACHES, ask, served
from fleet.proxies import HAPROXY, LITELLM, MASTER_KEY, Proxy, find, running

_KNOWN = {"model": "model", "messages": [{"role": "user", "content": "What is a lake?"}], "max_tokens": 16}
_REQUESTS = 60


def main() -> int:
    """Measure and print."""
    arguments = parse()
    for part in (processes, proxies):
        with tempfile.TemporaryDirectory() as folder:
            figures = {part.__name__: part(arguments, Path(folder))}
        print(json.dumps(figures, indent=None if arguments.json else 1), flush=True)
    return 0


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@contextmanager
def three(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Start three servers with a thread each behind HAProxy; yields the address."""
    with ExitStack() as stack:
        addresses = [stack.enter_context(served(arguments.bundle, 1, WITHOUT_CACHES))[0] for _ in range(3)]
        yield stack.enter_context(running(HAPROXY, addresses, "model", folder))[0]


def processes(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of all clients with one process and with three, in alternation, and the medians of the rounds'
    ratios."""
    if find(HAPROXY) is None:
        return {"not measured": "haproxy is not installed"}
    rounds: dict[str, list[dict[str, float]]] = {"one": [], "three": []}
    with served(arguments.bundle, arguments.threads, WITHOUT_CACHES) as (alone, _):
        one = servers(())
        with three(arguments, folder) as shared:
            places = {"one": (alone, one), "three": (shared, servers(one))}
            for number in range(arguments.rounds + 1):
                for name, (address, computing) in places.items():
                    rounds[name].append(asyncio.run(rates(address, computing, arguments, number)))
    pairs = list(zip(rounds["one"], rounds["three"], strict=True))[1:]
    names = pairs[0][0]
    return {
        "one": {name: round(statistics.median(one[name] for one, _ in pairs), 1) for name in names},
        "three": {name: round(statistics.median(several[name] for _, several in pairs), 1) for name in names},
        "ratio": {
            name: round(statistics.median(several[name] / one[name] for one, several in pairs), 2) for name in names
        },
    }


def servers(known: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The edgelm processes that this process started, without the known ones."""
    found = psutil.Process().children()
    return [process for process in found if "edgelm.runtime.cli" in process.cmdline() and process not in known]


async def rates(
    address: str, computing: Sequence[psutil.Process], arguments: argparse.Namespace, number: int
) -> dict[str, float]:
    """Tokens per second, and per second of the servers' CPU time, of all clients at once, one conversation each."""
    prompts = [f"Tell me about the number {1000 * number + client}." for client in range(arguments.clients)]
    wall, cpu = time.perf_counter(), sum(cpu_s(process.pid) for process in computing)
    answers = await asyncio.gather(*(ask(address, prompt, arguments.tokens, prompt) for prompt in prompts))
    taken = {"per_s": time.perf_counter() - wall, "per_cpu_s": sum(cpu_s(process.pid) for process in computing) - cpu}
    count = sum(answer.tokens for answer in answers)
    return {f"tokens_{name}": count / seconds for name, seconds in taken.items()}


def proxies(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The time of a request for a cached answer, directly and through each proxy, in alternation."""
    found = [proxy for proxy in (HAPROXY, LITELLM) if find(proxy) is not None]
    figures: dict[str, Any] = {
        f"{item.program} is not installed": None for item in (HAPROXY, LITELLM) if item not in found
    }
    with ExitStack() as stack:
        address, _ = stack.enter_context(served(arguments.bundle, arguments.threads, []))
        places = {"straight": (address, 0)}
        for proxy in found:
            places[proxy.program] = stack.enter_context(before_one(proxy, address, folder))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
        for _ in range(arguments.rounds + 1):
            for name, (place, process) in places.items():
                taken[name].append(asked(place, process))
    for name, rounds in taken.items():
        times, shares = zip(*rounds[1:], strict=True)
        figures[name] = {"ms": round(statistics.median(times), 2), "cpu_ms": round(statistics.median(shares), 2)}
    return figures


@contextmanager
def before_one(proxy: Proxy, address: str, folder: Path) -> Iterator[tuple[str, int]]:
    """A proxy whose three boards are the same server."""
    with running(proxy, [address] * 3, "model", folder) as place:
        yield place


def asked(address: str, process: int) -> tuple[float, float]:
    """Milliseconds of a request: its median duration, and the mean CPU time of the proxy."""
    before = cpu_s(process)
    taken = []
    with httpx.Client(base_url=address, timeout=60, headers={"Authorization": f"Bearer {MASTER_KEY}"}) as client:
        for _ in range(_REQUESTS):
            begun = time.perf_counter()
            client.post("/v1/chat/completions", json=_KNOWN).raise_for_status()
            taken.append(time.perf_counter() - begun)
    return 1000 * statistics.median(taken), 1000 * (cpu_s(process) - before) / _REQUESTS


def cpu_s(process: int) -> float:
    """CPU seconds of a process and its children; 0 for no process."""
    if not process:
        return 0.0
    whole = psutil.Process(process)
    return sum(sum(item.cpu_times()[:2]) for item in [whole, *whole.children(recursive=True)])


if __name__ == "__main__":
    raise SystemExit(main())
