"""Read the header of a GGUF file and check every number in it against the file's size; join files in parts.

transformers' readers trust the header: a count of 2**60 keeps them busy forever, and a truncated file gives short
tensors. So every file is checked here first. Nothing is allocated before the header's claim is checked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import SourceError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 4
# More than any vocabulary has. transformers needs some 500 bytes for each element.
_MOST_ELEMENTS = 1 << 21
_MOST_TENSORS = 1 << 17
_PIECE_BYTES = 1 << 24
_ALIGNMENT = 32
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PART_KEYS = "split."


@dataclass(frozen=True)
class Tensor:
    """A tensor's place. shape: as torch has it; type: ggml's number; offset: in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """A key of the header. value: a number, a text, or a list of them; raw: its bytes in the file, with the key's."""

    value: Any
    raw: bytes


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file."""

    path: Path
    version: int
    alignment: int
    entries: dict[str, Entry]
    tensors: tuple[Tensor, ...]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        found = self.entries.get(key)
        return default if found is None else found.value


def read_header(path: Path) -> Header:
    """Parse and check. Cost: a pass over the header. Raises: SourceError."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): give a GGUF file") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size

    def header(self) -> Header:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise SourceError(f"{self._path} is not a GGUF file (it does not begin with GGUF): download it again")
        version = self._number("I")
        if version not in _VERSIONS:
            raise SourceError(
                f"{self._path} has version {version} of GGUF, and edgelm reads 2 and 3 in little-endian order: convert "
                "the model again with a newer llama.cpp"
            )
        tensors, keys = self._count("tensors", 25, _MOST_TENSORS), self._count("keys", 13, _MOST_ELEMENTS)
        entries: dict[str, Entry] = {}
        for _ in range(keys):
            key, entry = self._entry()
            if key in entries:
                raise self._damaged(f"the key {key} is there twice")
            entries[key] = entry
        alignment = entries["general.alignment"].value if "general.alignment" in entries else _ALIGNMENT
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment!r}")
        infos = [self._tensor_info() for _ in range(tensors)]
        return Header(self._path, version, alignment, entries, self._placed(infos, alignment))

    def _count(self, what: str, least_bytes: int, most: int) -> int:
        """Read a count, and check that the file is large enough for so many things."""
        count: int = self._number("Q")
        if count * least_bytes > self._size - self._file.tell():
            raise self._cut_short(f"its header speaks of {count:,} {what}, more than it has room for")
        if count > most:
            raise SourceError(
                f"{self._path} has {count:,} {what}, and edgelm reads {most:,} at most: this is not a model"
            )
        return count

    def _entry(self) -> tuple[str, Entry]:
        begin = self._file.tell()
        key = self._text()
        value = self._value(self._number("I"))
        end = self._file.tell()
        self._file.seek(begin)
        return key, Entry(value, self._bytes(end - begin))

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"it holds a value of the unknown type {kind}")
        element = self._number("I")
        if element == _STRING:
            return [self._text() for _ in range(self._count("texts", 8, _MOST_ELEMENTS))]
        if element not in _SCALARS:
            raise self._damaged(f"it holds a list of the unknown type {element}")
        form = _SCALARS[element]
        count = self._count("numbers", struct.calcsize(form), _MOST_ELEMENTS)
        return list(struct.unpack(f"<{count}{form}", self._bytes(count * struct.calcsize(form))))

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        dimensions = self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"its tensor {name!r:.80} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions))
        return name, tuple(reversed(shape)), self._number("I"), self._number("Q")

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> tuple[Tensor, ...]:
        """The tensors, after checking that each is within the file and none overlap."""
        begin = -(-self._file.tell() // alignment) * alignment
        tensors = []
        for name, shape, kind, offset in infos:
            size = tensor_bytes(self._path, name, shape, kind)
            if begin + offset + size > self._size:
                end = begin + offset + size
                raise self._cut_short(f"its tensor {name} ends at byte {end:,}, the file at {self._size:,}")
            tensors.append(Tensor(name, shape, kind, begin + offset, size))
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damaged("several of its tensors have one name")
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._damaged(f"its tensor {tensor.name} lies on another's place")
            end = tensor.offset + tensor.bytes
        return tuple(tensors)

    def _text(self) -> str:
        try:
            return self._bytes(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text of its header is not UTF-8") from error

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise self._cut_short("it ends within its header")
        return self._file.read(count)

    def _cut_short(self, what: str) -> SourceError:
        return SourceError(f"{self._path} is cut short, or damaged: {what}: download it again")

    def _damaged(self, what: str) -> SourceError:
        return SourceError(f"{self._path} is damaged: {what}: download it again")


def tensor_bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    """The size of a tensor in the file. Raises: SourceError for a type that the package gguf does not know."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise SourceError(
            f"{path}: its tensor {name} has the unknown quantization type {kind}: pip install --upgrade gguf, or give "
            "another quantization of the model"
        ) from error
    if shape[-1] % block:
        raise SourceError(f"{path} is damaged: its tensor {name} has rows of {shape[-1]} values, not blocks of {block}")
    return math.prod(shape) // block * block_bytes


def find_parts(path: Path) -> list[Path]:
    """The files of a model in order: the file itself, or all of its parts. Raises: SourceError."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['name']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None or not parts:
        raise SourceError(f"{path} is one of {count} parts, of which {missing or 'all'} is not there: download it too")
    return parts


def model_name(path: Path) -> str:
    """A file's name without suffix and number of the part."""
    match = _PART.fullmatch(path.name)
    return match["name"] if match else path.stem


def check_parts(headers: list[Header]) -> None:
    """Check that these files belong together. Raises: SourceError."""
    tensors = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        said = header.get("split.no", 0), header.get("split.count", 1), header.get("split.tensors.count", tensors)
        if said != (number, len(headers), tensors):
            raise SourceError(
                f"{header.path} says that it is part {said[0] + 1} of {said[1]} with {said[2]} tensors in all, and is "
                f"part {number + 1} of {len(headers)} with {tensors}: download all parts again"
            )
    if len({tensor.name for header in headers for tensor in header.tensors}) < tensors:
        raise SourceError(f"{headers[0].path}: two parts hold one tensor: download all parts again")


def join_parts(headers: list[Header], out: Path) -> None:
    """Write the parts of a model as one file, which transformers can read. Cost: the model's size on the disk.

    Raises: OSError.
    """
    first = headers[0]
    entries = [entry.raw for key, entry in first.entries.items() if not key.startswith(_PART_KEYS)]
    tensors = [(header.path, tensor) for header in headers for tensor in header.tensors]
    infos, offset = [], 0
    for _, tensor in tensors:
        infos.append(_info(tensor, offset))
        offset += -(-tensor.bytes // first.alignment) * first.alignment
    with out.open("wb") as file:
        file.write(_MAGIC + struct.pack("<IQQ", first.version, len(tensors), len(entries)))
        file.writelines([*entries, *infos])
        for path, tensor in tensors:
            _pad(file, first.alignment)
            file.writelines(_pieces(path, tensor))


def _info(tensor: Tensor, offset: int) -> bytes:
    name = tensor.name.encode("utf-8")
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", tensor.type, offset)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _pieces(path: Path, tensor: Tensor) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.bytes
        while left:
            piece = file.read(min(left, _PIECE_BYTES))
            left -= len(piece)
            yield piece
