"""Several sequences in one graph: each has its row in the buffers of the KV cache, and a step runs all of them.

The rows in use are the first ones, so that the graph sees one contiguous part of each buffer; a row is contiguous too,
so a prompt is fed into its place. Where `rows_are_exact`, a row's logits are bit for bit those that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest, Model
from ..errors import SessionError
from ..host.ort import onnxruntime_errors
from .kv_cache import KVCache


def rows_are_exact(manifest: Manifest, least_rows: int) -> bool:
    """Whether a row of a batch gets the bits that it gets alone: with the scheme that promises them, where a step of a
    session over one text may have a single row.

    least_rows: `session.least_rows`. It is 2 where onnxruntime computes attention on a float32 cache, which takes
    another kernel for one token than for two, and refuses two tokens a row in a batch.
    """
    return manifest.exact_under_cuts and least_rows == 1


class OrtRowsSession:
    """`RowsSession` over onnxruntime. Memory: the cache of `max_rows` texts as long as the longest one."""

    def __init__(self, inference: Any, model: Model, max_rows: int, piece_tokens: int, scale_bytes: int = 0) -> None:
        """inference: onnxruntime's session, which may serve others too; scale_bytes: as of `KVCache`; the others: see
        `RowsSession`."""
        self.max_rows = max_rows
        self.piece_tokens = piece_tokens
        self._inference = inference
        self._model = model
        self.cache = KVCache(model, max_rows, scale_bytes)
        self._lengths: list[int] = []
        self._errors = onnxruntime_errors()
        self._one, self._all = _Binding(inference, model), _Binding(inference, model)

    def add(self) -> None:
        self._lengths.append(0)

    def copy(self, row: int, target: int, length: int) -> None:
        for _, buffer in self.cache.buffers():
            buffer[target, :, :length] = buffer[row, :, :length]
        self._lengths[target] = length

    def remove(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            self.copy(last, row, self._lengths[last])
        self._lengths.pop()

    def rewind(self, row: int, length: int) -> None:
        self._lengths[row] = length

    def feed(self, row: int, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._reserve(self._lengths[row] + len(token_ids))
        logits = self._run(self._one, row, row + 1, [token_ids])
        return np.asarray(logits[0])

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._reserve(max(self._lengths) + 1)
        return self._run(self._all, 0, len(self._lengths), [[token] for token in token_ids])

    def length(self, row: int) -> int:
        """Positions of a row."""
        return self._lengths[row]

    def read(self, row: int, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        """Copy the keys and values of positions begin to end - 1 of a row, as `KVCache.read`."""
        self.cache.read(begin, end, block, row)

    def append(self, row: int, block: NDArray[np.uint8], positions: int) -> None:
        """Put what `read` gave for so many positions behind the last one of a row."""
        begin = self._lengths[row]
        self._reserve(begin + positions)
        self.cache.write(begin, block, positions, row)
        self._lengths[row] += positions

    def _reserve(self, positions: int) -> None:
        self.cache.length = max(self._lengths)
        if self.cache.reserve(positions):
            self._one.rows = self._all.rows = range(0)

    def _run(self, binding: _Binding, begin: int, end: int, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        try:
            binding.bind_cache(self.cache, range(begin, end))
            logits = binding.run(ids, self._lengths[begin:end])
        except self._errors as error:
            reason = " ".join(str(error).split())
            raise SessionError(
                f"a step of {end - begin} rows, {len(ids[0])} tokens each, failed: {reason}; export the model again"
            ) from error
        for row in range(begin, end):
            self._lengths[row] += len(ids[0])
        return logits


class _Binding:
    """What the graph reads and writes in one kind of step; binds only what changed since the last one."""

    def __init__(self, inference: Any, model: Model) -> None:
        self._inference = inference
        self._binding = inference.io_binding()
        self._vocab_size = model.vocab_size
        self.rows = range(0)
        self._ids = np.zeros((0, 0), np.int64)
        self._logits = np.zeros((0, 1, model.vocab_size), np.float32)
        self._keep = np.ones(1, np.int64)
        self._bind("bind_input", "logits_to_keep", self._keep)

    def bind_cache(self, cache: KVCache, rows: range) -> None:
        if rows == self.rows:
            return
        for name, buffer in cache.buffers():
            part = buffer[rows.start : rows.stop]
            self._bind("bind_input", f"past_key_values.{name}", part)
            self._bind("bind_output", f"present.{name}", part)
        self.rows = rows

    def run(self, token_ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> NDArray[np.float32]:
        """token_ids: (rows, new), lengths: positions of each row so far. Returns: logits (rows, vocab_size)."""
        rows, new = len(token_ids), len(token_ids[0])
        if self._ids.shape != (rows, new):
            self._ids = np.zeros((rows, new), np.int64)
            self._bind("bind_input", "input_ids", self._ids)
        if len(self._logits) != rows:
            self._logits = np.zeros((rows, 1, self._vocab_size), np.float32)
            self._bind("bind_output", "logits", self._logits)
        self._ids[:] = token_ids
        totals = np.array(lengths, np.int64) + new
        mask = (np.arange(totals.max()) < totals[:, None]).astype(np.int64)
        self._bind("bind_input", "attention_mask", mask)
        self._inference.run_with_iobinding(self._binding)
        return self._logits[:, 0]

    def _bind(self, way: str, name: str, array: NDArray[Any]) -> None:
        # The address of a numpy array: the binding keeps no reference, whoever calls keeps the array until the run.
        getattr(self._binding, way)(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
