"""Blocks of tokens and their keys: a hash chain, so that a key stands for everything from the text's beginning.

The key of a block: BLAKE2b-256 of the key before it and the block's token ids, 4 bytes each, little-endian. Before the
first block stands the hash of the canonical JSON of [format, tokens of a block, bundle digest, the manifest's model,
numerics]. Two texts have the same first n keys if and only if they have the same first n blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from ...bundle.manifest import Manifest

# Only whole blocks are found again. Of 500 tokens in common, blocks of 64 leave 52 to compute, blocks of 16 four; 31
# blocks of 180 kB still cost less than one step (docs/caching.md).
BLOCK_TOKENS = 16

_FORMAT = 1
_KEY_BYTES = 32


def root_key(manifest: Manifest, numerics: str) -> bytes:
    """The key in front of every first block: bundle and machine. numerics: `numerics.of_machine()`."""
    content = [_FORMAT, BLOCK_TOKENS, manifest.digest, dataclasses.asdict(manifest.model), numerics]
    return _digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))


def block_keys(root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """The keys of all whole blocks of a text, 32 bytes each. Cost: about 1.5 us a block."""
    ids = np.asarray(token_ids, "<u4").tobytes()
    size = 4 * BLOCK_TOKENS
    keys, key = [], root
    for begin in range(0, len(ids) - size + 1, size):
        key = _digest(key + ids[begin : begin + size])
        keys.append(key)
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()
