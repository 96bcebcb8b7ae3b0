"""Use the stores of answers from many threads and processes, with kills and full disks; no answer may be lost or wrong.

    python scripts/stress_caches.py [--seconds 30] [--seed 0] [--processes 3] [--threads 3] [--only NAME ...]

memory    threads use and clear one in-memory store, for each eviction policy
sqlite    multithreaded processes use one database, for each policy, with small budgets and a time to live
kill      writers are killed with SIGKILL at random moments: no answer whose `put` returned may be missing
evict     the same with budgets so small that every `put` evicts: counts and sizes must be right after each kill
full      the disk is full for a while (simulated by a file size limit): stored answers stay, and later writes work
redis     multithreaded processes share a Redis server

Every part ends in the store's own `check()`. The correct answer follows from its key. The same seed makes the same
requests; the order of threads and processes depends on the machine. Exit status 1 at the first error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from known_answers import BrokenError, answer_of, expect, in_threads, key_of

from edgelm.runtime.caches.responses.database import DiskBudget
from edgelm.runtime.caches.responses.memory import MemoryStore
from edgelm.runtime.caches.responses.redis_store import RedisStore
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.caches.responses.store import Policy
from edgelm.runtime.errors import CacheError

LARGE = DiskBudget(2**30, 10**6)
SMALL = DiskBudget(2**20, 120)
POLICIES: tuple[Policy, ...] = ("lru", "lfu")


# ---- child processes: this file again, with --child


def start(role: str, place: Path | str, seed: int, arguments: argparse.Namespace, *more: str) -> subprocess.Popen[str]:
    """Start a child with one role in one place; it prints its result."""
    command = [sys.executable, __file__, "--child", role, str(place), "--seed", str(seed)]
    command += ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(children: list[subprocess.Popen[str]]) -> int:
    """Wait for children, which must succeed and print a count; returns the sum."""
    total = 0
    for child in children:
        text, _ = child.communicate()
        if child.returncode != 0:
            raise BrokenError(f"a process ended with status {child.returncode}")
        total += int(text)
    return total


def child(role: str, place: str, arguments: argparse.Namespace) -> None:
    """The work of a child."""
    if role == "use":
        store = SqliteStore(Path(place), SMALL, ttl_s=0.5, policy=POLICIES[arguments.seed % 2])
        print(in_threads(store, arguments.seed, arguments.threads, arguments.seconds))
        store.close()
    elif role == "redis":
        print(in_threads(RedisStore(place, ttl_s=5), arguments.seed, arguments.threads, arguments.seconds))
    else:
        write_on(SqliteStore(Path(place), SMALL if role == "evict" else LARGE), arguments.seed)


def write_on(store: SqliteStore, seed: int) -> None:
    """Store answer after answer, and print each number once its `put` returned, until killed."""
    for number in range(seed * 10**6, (seed + 1) * 10**6):
        store.put(key_of(number), answer_of(number))
        os.write(1, f"{number}\n".encode())


# ---- the parts


def memory(arguments: argparse.Namespace, folder: Path) -> str:
    done = 0
    for policy in POLICIES:
        store = MemoryStore(200_000, 100, ttl_s=0.2, policy=policy)
        done += in_threads(store, arguments.seed, arguments.threads, arguments.seconds / 2)
        store.check()
    return f"{done:,} requests"


def sqlite(arguments: argparse.Namespace, folder: Path) -> str:
    seeds = range(arguments.seed, arguments.seed + arguments.processes)
    done = finish([start("use", folder, seed, arguments) for seed in seeds])
    store = SqliteStore(folder)
    store.check()
    return f"{done:,} requests by {arguments.processes} processes, {store.stats().entries} answers left"


def kill(arguments: argparse.Namespace, folder: Path) -> str:
    stored: list[int] = []
    rounds = 0
    for seed in _rounds(arguments):
        stored += _killed("kill", folder, seed, arguments)
        store = SqliteStore(folder)
        store.check()
        for number in stored[-200:]:
            expect(number, store.get(key_of(number)), stored=True)
        store.close()
        rounds += 1
    store = SqliteStore(folder)
    for number in stored:
        expect(number, store.get(key_of(number)), stored=True)
    return f"{rounds} times {arguments.processes} processes killed, all of {len(stored):,} answers are there"


def evict(arguments: argparse.Namespace, folder: Path) -> str:
    stored = rounds = 0
    for seed in _rounds(arguments):
        numbers = _killed("evict", folder, seed, arguments)
        store = SqliteStore(folder)
        store.check()
        for number in numbers:
            expect(number, store.get(key_of(number)))
        store.close()
        stored += len(numbers)
        rounds += 1
    return f"{rounds} times {arguments.processes} processes killed, {stored:,} answers stored"


def full(arguments: argparse.Namespace, folder: Path) -> str:
    import resource

    store = SqliteStore(folder, LARGE)
    stored, refused, number = [], 0, 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    source = random.Random(arguments.seed)  # noqa: S311
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        largest = max((path.stat().st_size for path in folder.glob("*")), default=0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + source.randrange(100_000), limits[1]))
        for _ in range(40):
            number += 1
            try:
                store.put(key_of(number), answer_of(number))
                stored.append(number)
            except CacheError:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        number += 1
        store.put(key_of(number), answer_of(number))
        stored.append(number)
        if source.random() < 0.2:
            store.close()
    store.check()
    for each in stored:
        expect(each, store.get(key_of(each)), stored=True)
    return f"{refused:,} answers refused, all of {len(stored):,} others are there"


def redis(arguments: argparse.Namespace, folder: Path) -> str:
    if shutil.which("redis-server") is None:
        return "skipped: redis-server is not installed"
    with redis_server(folder) as url:
        seeds = range(arguments.seed, arguments.seed + arguments.processes)
        done = finish([start("redis", url, seed, arguments) for seed in seeds])
        RedisStore(url).check()
    return f"{done:,} requests by {arguments.processes} processes"


PARTS: dict[str, Callable[[argparse.Namespace, Path], str]] = {
    "memory": memory,
    "sqlite": sqlite,
    "kill": kill,
    "evict": evict,
    "full": full,
    "redis": redis,
}


def _rounds(arguments: argparse.Namespace) -> Iterator[int]:
    """Different seeds for groups of processes, until the time is over."""
    end, seed = time.monotonic() + arguments.seconds, 1
    while time.monotonic() < end:
        yield seed
        seed += arguments.processes


def _killed(role: str, folder: Path, seed: int, arguments: argparse.Namespace) -> list[int]:
    """Let writers work for a moment, then kill them; returns the numbers of the answers they stored."""
    children = [start(role, folder, seed + index, arguments) for index in range(arguments.processes)]
    begun = []
    for process in children:  # imports take a while
        assert process.stdout is not None
        begun.append(process.stdout.readline().endswith("\n"))  # false if others held the database for too long
    time.sleep(random.Random(arguments.seed + seed).random() * 0.3)  # noqa: S311
    numbers = []
    for index, process in enumerate(children):
        process.kill()
        text, _ = process.communicate()
        numbers += [(seed + index) * 10**6] * begun[index]
        numbers += [int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return numbers


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis server on a socket in the folder; yields its URL."""
    socket = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < end:
            time.sleep(0.02)
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="seconds for each part (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments)
        return 0
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name:8}{PARTS[name](arguments, Path(folder))}", flush=True)
            except (BrokenError, CacheError) as error:
                print(f"{name:8}BROKEN with seed {arguments.seed}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
