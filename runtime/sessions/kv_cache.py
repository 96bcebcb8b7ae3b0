"""The KV cache: a growing buffer for each layer's keys and one for its values, which the graph reads and writes in
place.

A buffer starts small, or as long as the text is expected to be, and doubles. It is never allocated for the whole
context, so a model with a context of 128k tokens costs only what the conversation needs. Rewinding lowers the length;
later steps overwrite the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import LayerCache, Model
from ..host.memory import available_bytes, require_bytes, zeros
from ..host.ort import load_onnxruntime

_FIRST_CAPACITY = 256
# More on a GPU than on a Raspberry Pi.
_FIRST_DEVICE_CAPACITY = 1024
_DTYPES = {"int8": np.int8, "float32": np.float32, "float16": np.float16}


class KVCache:
    """Keys and values of all layers for one sequence, or for several rows. Not safe between threads.

    `length`: positions in use (of the longest row). `capacity`: positions that the buffers can hold; bytes grow with
    capacity times rows. `moves`: how often the buffers were replaced. `expected`: set by the owner; the likely number
    of positions, for which the next growth makes room if there is memory.
    """

    def __init__(self, model: Model, rows: int = 1, scale_bytes: int = 0) -> None:
        """scale_bytes: bytes behind the values of each key and value, for its own scale: `CacheType.scale_bytes` if
        kernels compute attention, else 0."""
        self._model = model
        self._rows = rows
        self._scale_bytes = scale_bytes
        self._dtype = np.dtype(_DTYPES[model.kv.type])
        self._buffers: dict[str, NDArray[np.generic]] = {}
        self.capacity = 0
        self.length = 0
        self.expected = 0
        self.moves = 0

    @property
    def rows(self) -> int:
        """Rows that the buffers hold."""
        return self._rows

    def reserve(self, positions: int, rows: int = 1) -> bool:
        """Make room for so many positions in so many rows. Returns True if the buffers moved and must be bound again.

        Cost: nothing if there is room, else a copy of what is in use. Grows to double the size or to `expected`, at
        most to the context length plus one (for a padding row behind the last token), and to less if memory is short.
        Raises: MemoryShortageError, which leaves the cache as it is.
        """
        if positions <= self.capacity and rows <= self._rows:
            return False
        rows = max(rows, self._rows)
        row_bytes = rows * self.bytes_per_position()
        free = available_bytes()
        sizes = [self.capacity] if positions <= self.capacity else self._sizes(positions)
        capacity = next((size for size in sizes if size * row_bytes <= free), max(positions, self.length))
        # The old buffers stay until the new ones are filled. Nothing changes if memory is short.
        require_bytes(
            capacity * row_bytes,
            f"a conversation of {positions:,} tokens" if rows == 1 else f"{rows} texts of up to {positions:,} tokens",
            "start a new conversation, shorten the prompt, or close other programs",
        )
        self._move(rows, capacity)
        return True

    def keep_rows(self, rows: int) -> None:
        """Free the memory of all but the first rows. Cost: a copy of those."""
        if rows < self._rows:
            self._move(rows, self.capacity)

    def has_room(self, positions: int, rows: int) -> bool:
        """Whether there is memory for `reserve`."""
        if positions <= self.capacity and rows <= self._rows:
            return True
        size = max(positions, self.capacity) * max(rows, self._rows) * self.bytes_per_position()
        return size <= available_bytes()

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Cost: none."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def buffers(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Pairs of name ("N.key" or "N.value") and array (rows, kv_heads, capacity, head_size + scale_bytes), valid
        until `reserve` returns True. Positions from `length` on are undefined."""
        yield from self._buffers.items()

    def read(self, begin: int, end: int, block: NDArray[np.uint8], row: int = 0) -> None:
        """Copy positions begin to end - 1 of a row as bytes: buffer after buffer in the order of `buffers`, of each
        (kv_heads, positions, head_size + scale_bytes). 0 <= begin <= end <= length; block: (bytes_per_position *
        positions), is filled."""
        for part, buffer in self._parts(block, end - begin, row):
            part[...] = buffer[:, begin:end]

    def append(self, block: NDArray[np.uint8], positions: int) -> None:
        """Append what `read` gave for so many positions. The caller has called `reserve`.

        Raises: ValueError, if it has another size.
        """
        self.write(self.length, block, positions)
        self.length += positions

    def write(self, begin: int, block: NDArray[np.uint8], positions: int, row: int = 0) -> None:
        """Write what `read` gave for so many positions at a position of a row. The length does not change."""
        if block.nbytes != self.bytes_per_position() * positions:
            raise ValueError(f"{positions} positions do not take {block.nbytes} bytes")
        for part, buffer in self._parts(block, positions, row):
            buffer[:, begin : begin + positions] = part

    def bytes_per_position(self) -> int:
        """Bytes of one position over all layers."""
        rows = (layer.kv_heads * size for _, layer in self._layers() for _, size in self._sides(layer))
        return sum(rows) * self._dtype.itemsize

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold. For tests."""
        assert 0 <= self.length <= self.capacity
        for index, layer in self._layers():
            for side, size in self._sides(layer) if self.capacity else ():
                shape = (self._rows, layer.kv_heads, self.capacity, size)
                assert self._buffers[f"{index}.{side}"].shape == shape

    def _move(self, rows: int, capacity: int) -> None:
        moved: dict[str, NDArray[np.generic]] = {}
        kept = min(rows, self._rows)
        for index, layer in self._layers():
            for side, size in self._sides(layer):
                fresh = zeros((rows, layer.kv_heads, capacity, size), self._dtype)
                name = f"{index}.{side}"
                if name in self._buffers:
                    fresh[:kept, :, : self.length] = self._buffers[name][:kept, :, : self.length]
                moved[name] = fresh
        self._buffers, self._rows, self.capacity = moved, rows, capacity
        self.moves += 1

    def _sizes(self, positions: int) -> list[int]:
        """Capacities to try, the best first. The cache should move seldom, also in a small memory, and never at each
        token."""
        wanted = max(_FIRST_CAPACITY, 2 * self.capacity, self.expected)
        sizes = wanted, 2 * self.capacity, positions + _FIRST_CAPACITY
        return [max(positions, min(size, self._model.context_length + 1)) for size in sizes]

    def _parts(
        self, block: NDArray[np.uint8], positions: int, row: int
    ) -> Iterator[tuple[NDArray[np.generic], NDArray[np.generic]]]:
        """Pairs of a part of a block and the part of a buffer that it belongs to, both (kv_heads, positions, head_size
        + scale_bytes)."""
        begin = 0
        for buffer in self._buffers.values():
            _, heads, _, size = buffer.shape
            end = begin + heads * positions * size * self._dtype.itemsize
            yield block[begin:end].view(self._dtype).reshape(heads, positions, size), buffer[row]
            begin = end

    def _sides(self, layer: LayerCache) -> tuple[tuple[str, int], tuple[str, int]]:
        """The names of a layer's two buffers, and the length of their rows."""
        return ("key", layer.key_size + self._scale_bytes), ("value", layer.value_size + self._scale_bytes)

    def _layers(self) -> Iterator[tuple[int, LayerCache]]:
        return ((index, layer) for index, layer in enumerate(self._model.layers) if layer is not None)


class DeviceCache:
    """Keys and values of all layers, and ones for the mask, in the device's memory."""

    def __init__(self, model: Model, device: str) -> None:
        self._model = model
        self._device = device
        self._type = np.dtype(model.kv.type).type
        self.values: dict[str, Any] = {}
        self.mask: Any = None
        self.capacity = 0

    def reserve(self, positions: int, used: int) -> None:
        """Make room. Growing copies what is in use through the host's memory; buffers double, so it is rare."""
        if positions <= self.capacity:
            return
        wanted = max(_FIRST_DEVICE_CAPACITY, 2 * self.capacity, positions)
        capacity = max(positions, min(wanted, self._model.context_length))
        grown = {}
        for name, layer, size in self._sides():
            fresh = np.zeros((1, layer.kv_heads, capacity, size), self._type)
            if used:
                fresh[:, :, :used] = self.values[name].numpy()[:, :, :used]
            grown[name] = self._put(fresh)
        self.values, self.mask, self.capacity = grown, self._put(np.ones((1, capacity), np.int64)), capacity

    def bind(self, binding: Any) -> None:
        """Each buffer, (1, kv_heads, capacity, size), as past and as present."""
        for name, value in self.values.items():
            place = (self._device, 0, self._type, tuple(value.shape()), value.data_ptr())
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def _put(self, array: NDArray[Any]) -> Any:
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _sides(self) -> Iterator[tuple[str, LayerCache, int]]:
        for index, layer in enumerate(self._model.layers):
            if layer is not None:
                yield f"{index}.key", layer, layer.key_size
                yield f"{index}.value", layer, layer.value_size
