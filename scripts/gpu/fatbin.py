"""Leave out of a library what other GPUs need: kernels of other architectures, and kernels by their names.

NVIDIA's compiler puts the kernels of a program into the section `.nv_fatbin`: containers, each with one entry for each
architecture. The layout is not documented; it is what `cuobjdump` shows. A container: magic number, version, size of
this head, bytes behind it. An entry: kind (2: machine code), version, size of its head, bytes behind it, then at fixed
places the architecture (28) and flags (40), of which one says that the code is compressed with zstd.
Entries that are not wanted are overwritten with zeros: nothing moves, and zeros take no room in an archive. Whoever
launches such a kernel gets an error; kernels are loaded when they are first launched.
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
    """A place in a library: the bytes of one architecture's kernels."""

    begin: int
    end: int
    kind: int
    architecture: int
    compressed: bool


def strip_kernels(library: bytearray, architecture: int, unwanted: re.Pattern[bytes]) -> tuple[int, int]:
    """Overwrite all entries of other architectures, and those in which any kernel's name is unwanted.

    Returns: bytes that stay, bytes that went.
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
    """All entries of a library. Raises: ValueError, where the section is not as it is known."""
    place, end = _section(library, b".nv_fatbin")
    while place < end:
        magic, _, head, size = struct.unpack_from("<IHHQ", library, place)
        if magic != _MAGIC:
            place += 8  # between containers, which begin at multiples of 8
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
    """The names of an entry's kernels, one in a line."""
    code = bytes(library[entry.begin : entry.end])
    if entry.kind != _MACHINE_CODE:
        return b""
    if entry.compressed:
        code = zstandard.ZstdDecompressor().decompressobj().decompress(code)
    return b"\n".join(_NAME.findall(code))


def _section(library: bytearray, wanted: bytes) -> tuple[int, int]:
    """Where a section of an ELF file of 64 bits begins and ends."""
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
