"""Blocks in this process's memory, within a budget of bytes. The least recently used ones are evicted first."""

from __future__ import annotations

import mmap
import sys
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

# Overhead of a block: key, array object, table slot.
_ENTRY_BYTES = 300

Block = NDArray[np.uint8]

# Smaller blocks would waste much of a page, and a process may have only 65,530 mappings.
_LEAST_MAPPED_BYTES = 64 * 2**10


def new_block(size: int) -> Block:
    """An uninitialized block of so many bytes.

    Large blocks are mapped and unmapped one by one: in the heap, among short-lived arrays of the steps, they would
    leave holes (measured over 20,000 tokens: 20 MB on a budget of 23 MB).
    """
    if size < _LEAST_MAPPED_BYTES or sys.platform == "win32":
        return np.empty(size, np.uint8)
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


class BlockMemory:
    """Blocks under their keys. Not safe between threads: only the thread that runs a step uses it. Nothing is shared
    with other processes; a forked child continues with a copy. Cost: O(1) for each key. Raises: nothing, except
    `check`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Estimated bytes of all blocks, overhead included."""
        return self._bytes

    def get(self, key: bytes) -> Block | None:
        """The block or None. Does not count as a use."""
        return self._blocks.get(key)

    def use(self, keys: Sequence[bytes]) -> None:
        """Note a use of a chain. Its first block counts as used last: without it the others could not be found."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def put(self, key: bytes, block: Block, chain: Collection[bytes]) -> bool:
        """Store a block. Return whether there was room. chain: the keys of its text, which `use` noted just now.

        Blocks of other texts are evicted for it, never blocks of its chain: a text larger than the budget keeps its
        beginning.
        """
        size = block.nbytes + _ENTRY_BYTES
        while self._bytes + size > self._max_bytes:
            victim = next(iter(self._blocks), None)
            if victim is None or victim in chain:
                return False
            self._drop(victim)
        self._drop(key)
        self._blocks[key] = block
        self._bytes += size
        return True

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self._bytes = 0

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold. For tests."""
        assert self._bytes == sum(block.nbytes + _ENTRY_BYTES for block in self._blocks.values())
        assert 0 <= self._bytes <= self._max_bytes

    def _drop(self, key: bytes) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._bytes -= block.nbytes + _ENTRY_BYTES
