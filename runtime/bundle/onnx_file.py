"""Read an ONNX file's structure without the onnx package: the files that hold its weights, its operators, its size.

An ONNX file is a protobuf message: fields, each a number and a value, of which some are messages again. Only fields
on the way to a tensor's `external_data` are entered; everything else, weights above all, is skipped unread.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import BundleCorruptError, BundleMissingError
from ..host.files import UnfitFileError, open_regular

# For each message, the numbers of the fields to enter and what they hold (onnx.proto of the ONNX project).
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_GRAPH, _NODE, _CALL = 7, 1, (7, 4)  # of a node its domain and its operator
_TENSOR, _NAME, _RAW, _ENTRY, _INPUT, _OPERATOR = 5, 8, 9, 13, 1, 4
# Operators that read some rows of a table, not all of it.
_GATHERS = {"Gather", "GatherBlockQuantized"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BITS = 70
# The size limit of a protobuf message.
_MOST_BYTES = (2 << 30) - 1
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}

_Found = TypeVar("_Found")


def weight_files(graph: Path) -> list[str]:
    """Names of the files, relative to the graph's folder, that hold weights of the graph; empty if it holds them all.

    Cost: the file's structure is read, not its weights. Raises: BundleMissingError, BundleCorruptError.
    """
    return sorted(set(_read(graph, lambda data: _locations(data, 0, len(data), "model"))))


def operators(graph: Path) -> Counter[tuple[str, str]]:
    """How often the graph's own nodes call each operator and function, by domain and name. Cost and errors as
    `weight_files`."""
    return Counter(_read(graph, _calls))


def streamed_bytes(graph: Path) -> int:
    """How many bytes of weights a step of one token reads. A table from which rows are gathered (an embedding that is
    not the head too) counts as nothing, all other weights in full. Cost and errors as `weight_files`."""
    sizes: Counter[str] = Counter()
    readers: dict[str, set[str]] = {}
    for name, operator, size in _read(graph, _uses):
        sizes[name] += size
        if operator:
            readers.setdefault(name, set()).add(operator)
    return sum(size for name, size in sizes.items() if not readers.get(name, {""}) <= _GATHERS)


def _read(graph: Path, find: Callable[[mmap.mmap], Iterator[_Found]]) -> list[_Found]:
    try:
        with open_regular(graph, _MOST_BYTES) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(find(data))
    except UnfitFileError as error:
        raise BundleCorruptError(
            f"{graph} is not an ONNX file ({error.strerror}): download or export it again"
        ) from error
    except OSError as error:
        raise BundleMissingError(f"{graph} cannot be read ({error.strerror}): check its permissions") from error
    # ValueError also comes from an empty file, which cannot be mapped; the others come from bytes that are no message.
    except (ValueError, IndexError, RecursionError) as error:
        raise BundleCorruptError(
            f"{graph} is not an ONNX file, or a truncated one: download or export it again"
        ) from error


def _calls(data: mmap.mmap) -> Iterator[tuple[str, str]]:
    for number, begin, end in _fields(data, 0, len(data)):
        if number == _GRAPH:
            for inner, start, stop in _fields(data, begin, end):
                if inner == _NODE:
                    node = {part: data[first:last] for part, first, last in _fields(data, start, stop) if part in _CALL}
                    domain, name = (node.get(part, b"").decode("utf-8") for part in _CALL)
                    yield domain, name


def _uses(data: mmap.mmap) -> Iterator[tuple[str, str, int]]:
    """Weights of the graph as (name, "", bytes), and inputs of its nodes as (name, operator, 0)."""
    for number, begin, end in _fields(data, 0, len(data)):
        for inner, start, stop in _fields(data, begin, end) if number == _GRAPH else ():
            if inner == _TENSOR:
                yield _weight(data, start, stop)
            elif inner == _NODE:
                parts = [
                    (part, data[first:last].decode("utf-8"))
                    for part, first, last in _fields(data, start, stop)
                    if part in (_INPUT, _OPERATOR)
                ]
                operator = dict(parts).get(_OPERATOR, "")
                yield from ((name, operator, 0) for part, name in parts if part == _INPUT)


def _weight(data: mmap.mmap, begin: int, end: int) -> tuple[str, str, int]:
    name, size = "", 0
    for number, start, stop in _fields(data, begin, end):
        if number == _NAME:
            name = data[start:stop].decode("utf-8")
        elif number == _RAW:
            size = stop - start
        elif number == _ENTRY:
            entry = {part: data[first:last] for part, first, last in _fields(data, start, stop)}
            if entry.get(_KEY) == b"length":
                size = int(entry[_VALUE])
    return name, "", size


def _locations(data: mmap.mmap, begin: int, end: int, kind: str) -> Iterator[str]:
    if kind == "entry":
        entry = {number: data[start:stop] for number, start, stop in _fields(data, begin, end)}
        if entry.get(_KEY) == b"location":
            yield entry.get(_VALUE, b"").decode("utf-8")
        return
    inner = _FIELDS[kind]
    for number, start, stop in _fields(data, begin, end):
        if number in inner:
            yield from _locations(data, start, stop, inner[number])


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field that is a message or bytes."""
    position = begin
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, position = _varint(data, position)
        elif wire in _FIXED_SIZES:
            position += _FIXED_SIZES[wire]
        elif wire == _BYTES:
            size, position = _varint(data, position)
            if position + size > end:
                raise ValueError("a field ends behind its message")
            yield number, position, position + size
            position += size
        else:
            raise ValueError(f"no field has the wire type {wire}")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, least ones first, and the position behind it."""
    value, shift = 0, 0
    while shift < _VARINT_BITS:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")
