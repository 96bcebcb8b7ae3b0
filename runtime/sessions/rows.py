"""Several texts in one graph: each has its row in the buffers of the KV cache, and a step runs all of them.

The rows of a step are the first ones, so that the graph sees one contiguous part of each buffer; a row is contiguous
too, so a prompt is fed into its place. Where `rows_are_exact`, a row's logits are bit for bit those that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest, Model
from ..host.memory import zeros
from ..host.ort import onnxruntime_errors
from .binding import Binding
from .graph import REPAIR
from .kv_cache import KVCache
from .protocol import MOST_DRAFTS, Capabilities
from .providers import mapped_step_error

# Rows of logits in the buffer that steps share: one token and the draft tokens behind it. Rows that are never written
# take no memory.
_SHARED_ROWS = 1 + MOST_DRAFTS
# The graph slices `[-logits_to_keep:]`, so 0 keeps every row. This value starts past the end and keeps none.
_NO_ROWS = -np.iinfo(np.int64).max
# More rows than any machine benefits from; callers use far fewer.
_MOST_ROWS = 1024


def rows_are_exact(manifest: Manifest, capabilities: Capabilities) -> bool:
    """Whether a row in a batch gets the same bits as alone. This needs a scheme that promises them, and steps that may
    have a single row.

    If onnxruntime computes attention on a float32 cache, steps need two rows: it uses another kernel for one token than
    for two, and refuses two tokens a row in a batch.
    """
    return manifest.exact_under_cuts and capabilities.least_rows == 1


class OrtRows:
    """`Rows` and `Blocks` over onnxruntime. Memory: each row in use takes as much cache as the longest one."""

    max_rows = _MOST_ROWS

    def __init__(self, inference: Any, model: Model, *, scale_bytes: int, least_rows: int, least_kept: int) -> None:
        """inference: onnxruntime's session. scale_bytes: as of `KVCache`. least_rows: as of `Capabilities`.
        least_kept: the smallest number of rows of logits that the graph can compute."""
        self._model = model
        self._least_rows, self._least_kept = least_rows, least_kept
        self.cache = KVCache(model, scale_bytes=scale_bytes)
        self._lengths = [0]
        self._errors = onnxruntime_errors()
        # One binding for steps of one row, one for steps of all rows. Bound arrays stay bound from step to step.
        self._one, self._all = Binding(inference), Binding(inference)
        self._keep, self._single = np.zeros(1, np.int64), np.ones(1, np.int64)
        self._one.put("logits_to_keep", self._keep)
        self._all.put("logits_to_keep", self._single)
        self._ids = np.zeros((1, 0), np.int64)
        self._tokens = np.zeros((0, 1), np.int64)
        self._mask = np.ones((1, 0), np.int64)
        self._room = self._kept = np.zeros((1, 0, model.vocab_size), np.float32)
        self._logits = np.zeros((0, 1, model.vocab_size), np.float32)

    def length(self, row: int) -> int:
        return self._lengths[row] if row < len(self._lengths) else 0

    def can_rewind(self, row: int, length: int) -> bool:
        return 0 <= length <= self.length(row)

    def rewind(self, row: int, length: int) -> None:
        if not self.can_rewind(row, length):
            raise ValueError(f"cannot rewind a row of {self.length(row)} positions to {length}")
        if row < len(self._lengths):
            self._set_length(row, length)

    def copy(self, row: int, target: int, length: int) -> None:
        self._reserve(max(row, target), length)
        for _, buffer in self.cache.buffers():
            buffer[target, :, :length] = buffer[row, :, :length]
        self._set_length(target, length)

    def swap(self, row: int, other: int) -> None:
        if row == other:
            return
        self._reserve(max(row, other), 0)
        used = max(self._lengths[row], self._lengths[other])
        for _, buffer in self.cache.buffers():
            buffer[[row, other], :, :used] = buffer[[other, row], :, :used]
        self._lengths[row], self._lengths[other] = self._lengths[other], self._lengths[row]

    def expect(self, rows: int, positions: int) -> None:
        del self._lengths[rows:]
        self.cache.length = max(self._lengths, default=0)
        if rows == 1:  # keep the memory of two or more: their number often changes
            self.cache.keep_rows(1)
        self.cache.expected = positions

    def has_room(self, rows: int, positions: int) -> bool:
        return self.cache.has_room(positions, rows)

    def feed(self, row: int, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        begin = self.length(row)
        padding = max(0, self._least_rows - len(token_ids))
        new = len(token_ids) + padding
        try:
            self._reserve(row, begin + new)
            self._bind_one(row, new, max(keep, self._least_kept) + padding)
            self._ids[0, : len(token_ids)] = token_ids
            if padding:
                self._ids[0, len(token_ids) :] = token_ids[-1]
            self._one.put_once("attention_mask", self._mask[:, : begin + new])
            self._one.run()
        except self._errors as error:
            doing = f"a step of {new} tokens at position {begin}"
            raise mapped_step_error(str(error), doing, REPAIR) from error
        self._set_length(row, begin + len(token_ids))
        return self._kept[0, :keep]

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        rows = len(token_ids)
        try:
            self._reserve(rows - 1, max(self._lengths[:rows]) + 1)
            self._bind_all(rows)
            self._tokens[:, 0] = token_ids
            totals = np.array(self._lengths[:rows], np.int64) + 1
            self._all.put_once("attention_mask", (np.arange(totals.max()) < totals[:, None]).astype(np.int64))
            self._all.run()
        except self._errors as error:
            raise mapped_step_error(str(error), f"a step of {rows} rows, 1 token each,", REPAIR) from error
        for row in range(rows):
            self._set_length(row, self._lengths[row] + 1)
        return self._logits[:, 0]

    def block_bytes(self, positions: int) -> int:
        return self.cache.bytes_per_position() * positions

    def read(self, row: int, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        self.cache.read(begin, end, block, row)

    def append(self, row: int, block: NDArray[np.uint8], positions: int) -> None:
        begin = self.length(row)
        self._reserve(row, begin + positions)
        self.cache.write(begin, block, positions, row)
        self._set_length(row, begin + positions)

    def close(self) -> None:
        """Free the graph and the cache. Calling it again does nothing."""
        self._one.close()
        self._all.close()
        self.cache = KVCache(self._model)
        self._lengths = [0]

    def _reserve(self, row: int, positions: int) -> None:
        """Make room in a row. The number of rows doubles, so that buffers seldom move."""
        rows = max(self.cache.rows, 1)
        while rows <= row:
            rows *= 2
        self.cache.reserve(max(positions, self.cache.length), rows)
        self._lengths += [0] * (row + 1 - len(self._lengths))

    def _set_length(self, row: int, length: int) -> None:
        self._lengths[row] = length
        self.cache.length = max(self._lengths)

    def _bind_one(self, row: int, new: int, keep: int) -> None:
        """Bind what changed since the last step of a single row: in most steps only the mask's length."""
        self._one.cache(
            (self.cache.moves, row), ((name, buffer[row : row + 1]) for name, buffer in self.cache.buffers())
        )
        if self._mask.shape[1] != self.cache.capacity:
            self._mask = np.ones((1, self.cache.capacity), np.int64)
        if new != self._ids.shape[1]:
            self._ids = np.zeros((1, new), np.int64)
            self._one.put("input_ids", self._ids)
        if keep != self._kept.shape[1] or self._kept is self._room:
            # Steps with and without draft tokens share one buffer. A larger one is not kept.
            size = max(keep, _SHARED_ROWS)
            if size != self._room.shape[1]:
                self._room = zeros((1, size, self._model.vocab_size), np.float32)
            self._kept = self._room[:, :keep]
            self._one.take("logits", self._kept)
        self._keep[0] = keep or _NO_ROWS

    def _bind_all(self, rows: int) -> None:
        self._all.cache((self.cache.moves, rows), ((name, buffer[:rows]) for name, buffer in self.cache.buffers()))
        if len(self._tokens) != rows:
            self._tokens = np.zeros((rows, 1), np.int64)
            self._logits = np.zeros((rows, 1, self._model.vocab_size), np.float32)
            self._all.put("input_ids", self._tokens)
            self._all.take("logits", self._logits)
