"""A finished answer, the key of its request, and the bytes that SQLite and Redis store.

Key: "sha256:" and the hash of the canonical JSON of [bundle digest, token ids, settings].
Bytes: `A1`, 16 bytes of BLAKE2b over key and payload, the payload: UTF-8 JSON [created, reason, [[text, ids], ...]].
The checksum covers the key, so an entry that a damaged index returns for another key is seen as damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import CacheCorruptError
from ...host.clock import CLOCK_SLACK_S
from ...results import CompleteReason

# What Python objects cost, as sys.getsizeof adds them up: an entry's key, dataclass and table slot; a chunk's tuples
# and string; an id's integer and reference.
_ENTRY_BYTES = 480
_CHUNK_BYTES = 160
_ID_BYTES = 36

_MAGIC = b"A1"
_CHECKSUM_BYTES = 16
_HEAD_BYTES = len(_MAGIC) + _CHECKSUM_BYTES


@dataclass(frozen=True)
class CachedAnswer:
    """A finished answer as it was streamed: (text, token ids) of each chunk, and why it ended.

    created: seconds since 1970 by the clock of the machine that computed it; not compared by `==`.
    """

    chunks: tuple[tuple[str, tuple[int, ...]], ...]
    finish_reason: CompleteReason
    created: float = field(default_factory=time.time, compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the whole answer."""
        return tuple(token for _, ids in self.chunks for token in ids)

    def size(self) -> int:
        """Estimated bytes in memory."""
        return _ENTRY_BYTES + sum(_CHUNK_BYTES + 4 * len(text) + _ID_BYTES * len(ids) for text, ids in self.chunks)

    def expired(self, ttl_s: float | None, now: float) -> bool:
        """Whether it is older than ttl_s at the wall time `now`, or more than a minute in the future.

        The latter happens after a clock was set back: the true age is unknown, so it counts as expired.
        """
        return ttl_s is not None and not -CLOCK_SLACK_S <= now - self.created < ttl_s


def response_key(bundle_digest: str, token_ids: Sequence[int], settings: Mapping[str, Any]) -> str:
    """ "sha256:" and the hash of the canonical JSON of [bundle digest, token ids, settings], keys sorted, no blanks."""
    canonical = json.dumps([bundle_digest, list(token_ids), dict(settings)], sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()


def encode_answer(key: str, answer: CachedAnswer) -> bytes:
    """The bytes to store under a key."""
    content = [answer.created, answer.finish_reason, answer.chunks]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A model may write half of a surrogate pair, which strict UTF-8 refuses.
    payload = text.encode("utf-8", "surrogatepass")
    return _MAGIC + _checksum(key, payload) + payload


def decode_answer(key: str, data: object) -> CachedAnswer:
    """The answer that `encode_answer` was given. Raises: CacheCorruptError, unless the bytes were written under this
    key."""
    if not isinstance(key, str) or not isinstance(data, bytes) or data[: len(_MAGIC)] != _MAGIC:
        raise CacheCorruptError(f"the entry {key} does not start as an answer does")
    payload = data[_HEAD_BYTES:]
    if data[len(_MAGIC) : _HEAD_BYTES] != _checksum(key, payload):
        raise CacheCorruptError(f"the checksum of the entry {key} is wrong")
    try:
        created, reason, chunks = json.loads(payload.decode("utf-8", "surrogatepass"))
        answer = CachedAnswer(tuple((text, tuple(ids)) for text, ids in chunks), reason, created)
    except (ValueError, TypeError, RecursionError) as error:
        raise CacheCorruptError(f"the entry {key} holds no answer ({error})") from error
    if not _is_answer(answer):
        raise CacheCorruptError(f"the entry {key} holds no answer")
    return answer


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_CHECKSUM_BYTES, key=hashlib.sha256(key.encode()).digest()).digest()


def _is_answer(answer: CachedAnswer) -> bool:
    """Whether the types are right: a checksum is no signature, and others may have written to the server."""
    return (
        isinstance(answer.created, (int, float))
        and math.isfinite(answer.created)
        and answer.finish_reason in typing.get_args(CompleteReason)
        and len(answer.chunks) > 0
        and all(isinstance(text, str) for text, _ in answer.chunks)
        and all(type(token) is int for token in answer.token_ids)
    )
