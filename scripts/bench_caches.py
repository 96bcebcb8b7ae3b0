"""Measure the duration of a hit in the response cache: in memory, in a database of 100,000 answers, in Redis.

    python scripts/bench_caches.py [--entries 100000] [--requests 2000] [--json FILE]

A hit is measured as in an engine: computing the key of a request with 128 token ids, asking the store, and recording
the use. An answer has 64 chunks of one token. Requests are drawn at random from all entries. Prints medians and 99th
percentiles in milliseconds. Filling the database takes some minutes. Redis is measured if `redis-server` is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stress_caches import redis_server

from edgelm.runtime.caches.responses.cache import CachedAnswer, ResponseCache, response_key
from edgelm.runtime.caches.responses.database import DiskBudget
from edgelm.runtime.caches.responses.memory import MemoryStore
from edgelm.runtime.caches.responses.redis_store import RedisStore
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.caches.responses.store import AnswerStore

SETTINGS = {"max_tokens": 64, "limit": 64, "stop_ids": [2], "numerics": "x86_64"}
LARGE = 2**40


def key_of(number: int) -> str:
    """The key of a numbered request of 128 tokens."""
    return response_key("sha256:bench", [number, *range(127)], SETTINGS)


def answer_of(number: int) -> CachedAnswer:
    """A numbered answer of 64 tokens."""
    return CachedAnswer(tuple((f" word{number % 1000}", (index,)) for index in range(64)), "length")


def measure(make: Callable[[], ResponseCache], entries: int, requests: int) -> dict[str, float]:
    """Milliseconds of each hit. `make` may return a new cache for each."""
    source = random.Random(0)  # noqa: S311
    times = []
    for _ in range(requests):
        number = source.randrange(entries)
        cache = make()
        start = time.perf_counter()
        found = cache.get(key_of(number))
        times.append((time.perf_counter() - start) * 1000)
        if found != answer_of(number):
            raise SystemExit(f"answer {number} is wrong or missing")
    return {"median_ms": statistics.median(times), "p99_ms": statistics.quantiles(times, n=100)[98]}


def fill(store: AnswerStore, entries: int) -> float:
    """Store all answers; returns the average milliseconds of a `put`."""
    start = time.perf_counter()
    for number in range(entries):
        store.put(key_of(number), answer_of(number))
        if number % 10_000 == 0:
            print(f"  {number:,} of {entries:,}", file=sys.stderr)
    return (time.perf_counter() - start) * 1000 / entries


def in_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Everything is in memory."""
    store = MemoryStore(LARGE, arguments.entries)
    put = fill(store, arguments.entries)
    cache = ResponseCache(store)
    return {**measure(lambda: cache, arguments.entries, arguments.requests), "put_ms": put}


def outside(store: AnswerStore, arguments: argparse.Namespace) -> dict[str, float]:
    """Nothing is in memory: each hit is read from the store."""
    put = fill(store, arguments.entries)
    store.close()
    return {
        **measure(lambda: ResponseCache(outer=store), arguments.entries, arguments.requests),
        "put_ms": put,
        "megabytes": store.stats().bytes / 1e6,
    }


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {"memory": in_memory(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder), DiskBudget(LARGE, arguments.entries))
        figures["disk"] = outside(store, arguments)
        store.close()
    if shutil.which("redis-server"):
        with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
            figures["redis"] = outside(RedisStore(url), arguments)
    for name, row in figures.items():
        print(f"{name:8}" + "".join(f"{key} {value:.3f}   " for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
