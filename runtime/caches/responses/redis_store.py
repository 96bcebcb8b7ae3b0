"""Answers on a Redis server, for machines that share them. Needs the extra `redis`; connects at the first use.

Keys are `edgelm:response:1:` and the answer's key; no other key of the server is read or removed. The budget is the
server's own setting: `maxmemory` and a `maxmemory-policy` such as `allkeys-lru` or `volatile-lfu`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ...errors import CacheCorruptError, CacheError, MissingExtraError, SettingsError
from ...host.clock import Clock
from .answers import CachedAnswer, decode_answer, encode_answer
from .store import StoreStats

_PREFIX = b"edgelm:response:1:"
_TIMEOUT_S = 1.0
_BATCH = 500

log = logging.getLogger(__name__)


class RedisStore:
    """Answers behind a URL of redis-py: redis://, rediss:// (TLS) or unix://.

    Atomic: `get` and `put`, each one command of the server. `clear`, `stats` and `check` are not atomic. Between
    threads, processes and machines: safe. Anyone who may write to the server can plant answers for all its users: a
    checksum finds damage, not intent. Raises: CacheError, if the server refuses, or twice does not answer within a
    second.
    """

    def __init__(self, url: str, *, ttl_s: float | None = None, clock: Clock | None = None) -> None:
        """ttl_s: seconds that an answer lives, counted by the server; None: until the server evicts it.

        Raises: MissingExtraError without redis-py; SettingsError for a URL that it does not understand.
        """
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("a response cache on a Redis server", "redis") from error
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._ttl_s, self._clock = ttl_s, clock or Clock()
        # The URL may hold a password, so messages show only host and port.
        self._place = _place(url)
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                decode_responses=False,
                retry=Retry(NoBackoff(), 1),  # one retry, for a connection that the server closed meanwhile
            )
        except ValueError as error:
            raise SettingsError(
                f"redis_url must start with redis://, rediss:// or unix://, found {self._place}"
            ) from error

    def get(self, key: str) -> CachedAnswer | None:
        """The answer, or None. A damaged one is removed, with a warning in the log. Cost: one round trip."""
        with self._mapped():
            data = self._client.get(_name(key))
        if data is None:
            return None
        try:
            answer = decode_answer(key, data)
        except CacheCorruptError as error:
            log.warning("the Redis server at %s gave a damaged answer, which was removed (%s)", self._place, error)
            with self._mapped():
                self._client.unlink(_name(key))
            return None
        return None if answer.expired(self._ttl_s, self._clock.wall()) else answer

    def touch(self, key: str) -> None:
        """Do nothing: the server counts reads itself, and a round trip costs more than it is worth."""

    def put(self, key: str, answer: CachedAnswer) -> None:
        """Store an answer; the server removes it after ttl_s. Cost: one round trip."""
        milliseconds = None if self._ttl_s is None else max(1, round(self._ttl_s * 1000))
        with self._mapped():
            self._client.set(_name(key), encode_answer(key, answer), px=milliseconds)

    def clear(self) -> None:
        """Remove all answers of edgelm. Cost: the server looks at all its keys, in steps."""
        with self._mapped():
            for names in self._batches():
                self._client.unlink(*names)

    def stats(self) -> StoreStats:
        """Entries, and bytes of their values. Cost: as `clear`."""
        entries = size = 0
        with self._mapped():
            for names in self._batches():
                entries += len(names)
                size += sum(self._each("strlen", names))
        return StoreStats(entries, size, None, None)

    def check(self) -> None:
        """Raises: CacheCorruptError for the first damaged answer. Cost: reads all answers."""
        with self._mapped():
            for names in self._batches():
                for name, data in zip(names, self._each("get", names), strict=True):
                    if data is not None:  # expired between the two commands
                        decode_answer(name[len(_PREFIX) :].decode("utf-8", "replace"), data)

    def close(self) -> None:
        """Close the connections that no thread is using. A later call connects again."""
        with self._mapped():
            self._client.connection_pool.disconnect(inuse_connections=False)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            raise CacheError(
                f"the Redis server at {self._place} failed ({error}): check that it is running and reachable"
            ) from error

    def _batches(self) -> Iterator[list[bytes]]:
        names: set[bytes] = set()  # SCAN may name a key twice
        for name in self._client.scan_iter(match=_PREFIX + b"*", count=_BATCH):
            names.add(name)
            if len(names) >= _BATCH:
                yield sorted(names)
                names = set()
        if names:
            yield sorted(names)

    def _each(self, command: str, names: list[bytes]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            getattr(pipeline, command)(name)
        results: list[Any] = pipeline.execute()
        return results


def _name(key: str) -> bytes:
    return _PREFIX + key.encode("utf-8")


def _place(url: str) -> str:
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else parts.path}"
    except ValueError:
        return "a URL that cannot be read"
