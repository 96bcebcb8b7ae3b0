"""The file of one block: a header of 32 bytes, then the block's bytes as `KVCache.read` gave them.

Header, little-endian: `edgelmKV`, version (uint32), length of the block (uint32), 16 bytes of BLAKE2b over it, keyed
with the block's key. The shapes and types of all layers are part of the key, so the file does not repeat them, and a
renamed file is seen as damaged. crc32 is five times as fast, but damage that it misses would give a wrong answer;
BLAKE2b costs 1 % of computing the block.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from ...errors import CacheCorruptError, CacheVersionError
from .memory import Block

VERSION = 1
_MAGIC = b"edgelmKV"
_HEADER = struct.Struct("<8sII16s")
HEADER_BYTES = _HEADER.size


def encode(key: bytes, block: Block) -> bytes:
    """The header that stands in front of a block. key: 32 bytes."""
    return _HEADER.pack(_MAGIC, VERSION, block.nbytes, _checksum(key, block))


def decode(key: bytes, data: bytes, size: int | None = None) -> Block:
    """The block in a file's bytes, without copying. size: the expected size in bytes, if known.

    Raises: CacheCorruptError, unless the bytes are those written under this key; CacheVersionError.
    """
    check_header(data)
    block: Block = np.frombuffer(data, np.uint8, offset=HEADER_BYTES)
    _, _, length, checksum = _HEADER.unpack_from(data)
    if block.nbytes != length or (size is not None and length != size):
        raise CacheCorruptError(f"it holds {block.nbytes:,} bytes instead of {size or length:,}")
    if checksum != _checksum(key, block):
        raise CacheCorruptError("its checksum is wrong")
    return block


def check_header(data: bytes) -> None:
    """Look at magic and version. Raises: CacheCorruptError, CacheVersionError."""
    if len(data) < HEADER_BYTES or not data.startswith(_MAGIC):
        raise CacheCorruptError("it does not start as a block does")
    version = _HEADER.unpack_from(data)[1]
    if version > VERSION:
        raise CacheVersionError(f"it has version {version}, this edgelm knows {VERSION}")
    if version != VERSION:
        raise CacheCorruptError(f"it has version {version}, which never was")


def _checksum(key: bytes, block: Block) -> bytes:
    return hashlib.blake2b(block.data, digest_size=16, key=key).digest()
