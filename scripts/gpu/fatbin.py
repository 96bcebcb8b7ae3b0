"""Remove kernels from a library that this GPU does not need: other architectures, and kernels by name.

NVIDIA's compiler puts a program's kernels into the section `.nv_fatbin`: containers with an entry per architecture. The
layout is not documented; it is as `cuobjdump` shows it. A container: magic number, version, size of this header, bytes
after it. An entry: kind (2: machine code), version, size of its header, bytes after it, then at fixed offsets the
architecture (28) and flags (40), one of which means zstd compression. Unwanted entries are overwritten with zeros:
nothing moves, and zeros compress to almost nothing. Launching such a kernel is an error; kernels are loaded at their
first launch.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard

_MAGIC = 0xBA55ED50
_MACHINE_CODE = 2
_ZSTD = 0x8000
_NAME = re.compile(rb"\.text\.([!-~]+)")


@dataclass(frozen=True)
class Entry:
    """The bytes of one architecture's kernels in a library."""

    begin: int
    end: int
    kind: int
    architecture: int
    compressed: bool


def strip_kernels(library: bytearray, architecture: int, unwanted: re.Pattern[bytes]) -> tuple[int, int]:
    """Overwrite all entries of other architectures, and entries with a kernel whose name is unwanted.

    Returns the numbers of bytes kept and removed.
    """
    kept = gone = 0
    for entry in entries(library):
        wanted = entry.architecture == architecture and not unwanted.search(_names(library, entry))
        size = entry.end - entry.begin
        if wanted:
            kept += size
        else:
            library[entry.begin : entry.end] = bytes(size)
            gone += size
    return kept, gone


def entries(library: bytearray) -> Iterator[Entry]:
    """All entries of a library. Raises: ValueError, if the section has an unknown layout."""
    place, end = _section(library, b".nv_fatbin")
    while place < end:
        magic, _, head, size = struct.unpack_from("<IHHQ", library, place)
        if magic != _MAGIC:
            place += 8  # padding: containers begin at multiples of 8
            continue
        yield from _container(library, place + head, place + head + size)
        place += head + size


def _container(library: bytearray, place: int, end: int) -> Iterator[Entry]:
    while place < end:
        kind, _, head, size = struct.unpack_from("<HHIQ", library, place)
        (architecture,) = struct.unpack_from("<I", library, place + 28)
        (flags,) = struct.unpack_from("<Q", library, place + 40)
        if head < 64 or place + head + size > end:
            raise ValueError("the library's kernels are not stored as this script knows them")
        yield Entry(place + head, place + head + size, kind, architecture, bool(flags & _ZSTD))
        place += head + size


def _names(library: bytearray, entry: Entry) -> bytes:
    """The names of an entry's kernels, one a line."""
    code = bytes(library[entry.begin : entry.end])
    if entry.kind != _MACHINE_CODE:
        return b""
    if entry.compressed:
        code = zstandard.ZstdDecompressor().decompressobj().decompress(code)
    return b"\n".join(_NAME.findall(code))


def _section(library: bytearray, wanted: bytes) -> tuple[int, int]:
    """Begin and end of a section in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)
    (names_at,) = struct.unpack_from("<Q", library, table + names * size + 24)
    for index in range(count):
        (name,) = struct.unpack_from("<I", library, table + index * size)
        if _is(library, names_at + name, wanted):
            begin, length = struct.unpack_from("<QQ", library, table + index * size + 24)
            return begin, begin + length
    raise ValueError(f"the library has no section {wanted.decode()}")


def _is(library: bytearray, place: int, name: bytes) -> bool:
    return bytes(library[place : place + len(name) + 1]) == name + b"\0"
