"""Answers whose correct content follows from their number, and random use of a store that checks each answer."""

from __future__ import annotations

import random
import threading
import time

from edgelm.runtime.caches.responses.answers import CachedAnswer, response_key
from edgelm.runtime.caches.responses.store import AnswerStore

KEYS = 300


class BrokenError(Exception):
    """An answer is lost or wrong."""


def key_of(number: int) -> str:
    """The key of a numbered request."""
    return response_key("sha256:stress", [number], {})


def answer_of(number: int) -> CachedAnswer:
    """The correct answer of a numbered request: some words, sometimes many."""
    source = random.Random(number)  # noqa: S311
    words = source.choice((1, 5, 40, 400))
    return CachedAnswer(tuple((f"word{source.randrange(10**6)} ", (number, index)) for index in range(words)), "stop")


def expect(number: int, found: CachedAnswer | None, *, stored: bool = False) -> None:
    """Raise BrokenError if an answer is wrong, or missing although it must be stored."""
    if found is None and stored:
        raise BrokenError(f"answer {number} was stored and is lost")
    if found is not None and found != answer_of(number):
        raise BrokenError(f"answer {number} is wrong")


def use(store: AnswerStore, source: random.Random, seconds: float) -> int:
    """Make random requests until the time is over; returns their number."""
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number = min(source.randrange(KEYS), source.randrange(KEYS))
        action = source.random()
        if action < 0.6:
            expect(number, store.get(key_of(number)))
        elif action < 0.98:
            store.put(key_of(number), answer_of(number))
        elif action < 0.995:
            store.close()
        else:
            store.clear()
        done += 1
    return done


def in_threads(store: AnswerStore, seed: int, threads: int, seconds: float) -> int:
    """`use` from several threads at once; raises the first error."""
    done: list[int] = []
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            done.append(use(store, random.Random(seed * 1000 + number), seconds))  # noqa: S311
        except Exception as error:  # noqa: BLE001, raised below, in the thread that can report it
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(done)
