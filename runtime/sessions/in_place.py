"""`OrtSession`: onnxruntime on bound buffers. A step writes into the KV cache in place, and copies token ids and logits
only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Model
from ..errors import SessionError
from ..host.memory import zeros
from ..host.ort import onnxruntime_errors
from . import kernels
from .graph import REPAIR, load_graph
from .kv_cache import KVCache
from .protocol import KERNELS_PIECE_TOKENS, MOST_GUESSES, PIECE_TOKENS
from .providers import CPU
from .rows import OrtRowsSession

# One row alone takes another float kernel inside onnxruntime's attention than several rows do, and differs in the last
# bits. With a float32 cache a step therefore always has two rows, unless compiled kernels compute its attention; with
# an int8 cache both of onnxruntime's kernels give the same bits.
_FLOAT_CACHE_ROWS = 2
# Rows of logits that a step may keep without a new buffer: those of a token and the draft tokens behind it. The system
# gives memory only to rows that are written.
_SHARED_ROWS = 1 + MOST_GUESSES
# The graph slices `[-logits_to_keep:]`, so 0 keeps every row; this keeps none.
_NO_ROWS = -np.iinfo(np.int64).max


class OrtSession:
    """`Session` over onnxruntime. Loading maps the weights and prepares them for this CPU (some 0.2 s for 135 MB)."""

    def __init__(
        self,
        graph: Path,
        model: Model,
        threads: int,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        preparing: Path | None = None,
    ) -> None:
        """graph: path of the ONNX file, whose weights lie beside it; preparing: as `load_graph`.

        Raises: SessionError.
        """
        self._model = model
        self._inference = load_graph(graph, threads, providers, preparing)
        by_kernels = providers[0] == CPU and kernels.attend(graph)
        # Without kernels, keys and values have the fixed scales alone: rows are as long as a head.
        self._scale_bytes = model.kv.scale_bytes if by_kernels else 0
        self.cache = KVCache(model, scale_bytes=self._scale_bytes)
        self._binding = self._inference.io_binding()
        self._unbound = False
        self._ids = np.zeros((1, 0), np.int64)
        self._mask = np.ones((1, 0), np.int64)
        self._keep = np.zeros(1, np.int64)
        self._logits = np.zeros((1, 0, model.vocab_size), np.float32)
        self._room = self._logits
        self._bind_input("logits_to_keep", self._keep)
        self._bind_output("logits", self._logits)
        self._errors = onnxruntime_errors()
        # onnxruntime's own operators do not all take 0 rows: where it computes layers, a step has logits of one.
        whole = providers[0] == CPU and kernels.serve(graph) and kernels.compute_layers(graph)
        self._least_kept = 0 if whole else 1
        self.least_rows = _FLOAT_CACHE_ROWS if model.kv.type == "float32" and not by_kernels else 1
        self.piece_tokens = KERNELS_PIECE_TOKENS if by_kernels else PIECE_TOKENS

    @property
    def length(self) -> int:
        return self.cache.length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        padding = max(0, self.least_rows - len(token_ids))
        rows = len(token_ids) + padding
        try:
            self._prepare(rows, max(keep, self._least_kept) + padding)
            self._ids[0, : len(token_ids)] = token_ids
            if padding:
                self._ids[0, len(token_ids) :] = token_ids[-1]
            self._inference.run_with_iobinding(self._binding)
        except self._errors as error:
            reason = " ".join(str(error).split())
            raise SessionError(
                f"a step of {rows} tokens at position {self.length} failed: {reason}; {REPAIR}"
            ) from error
        self.cache.length += len(token_ids)
        return self._logits[0, :keep]

    def expect(self, positions: int) -> None:
        self.cache.expected = positions

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self.length

    def rewind(self, length: int) -> None:
        self.cache.truncate(length)

    def rows(self, max_rows: int) -> OrtRowsSession:
        """Several sequences over the same graph, in a cache of their own."""
        return OrtRowsSession(self._inference, self._model, max_rows, self.piece_tokens, self._scale_bytes)

    def read(self, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        """Copy the keys and values of positions begin to end - 1, as `KVCache.read`."""
        self.cache.read(begin, end, block)

    def append(self, block: NDArray[np.uint8], positions: int) -> None:
        """Put what `read` gave for so many positions behind the last one, as if their tokens had been run."""
        self._unbound |= self.cache.reserve(self.length + positions)
        self.cache.append(block, positions)

    def block_bytes(self, positions: int) -> int:
        """The size of a block of so many positions."""
        return self.cache.bytes_per_position() * positions

    def close(self) -> None:
        self._binding = self._inference = None
        self.cache = KVCache(self._model)

    def _prepare(self, rows: int, keep: int) -> None:
        """Bind what changed since the last step: most steps only the mask's length."""
        self._unbound |= self.cache.reserve(self.length + rows)
        if self._unbound:
            self._mask = np.ones((1, self.cache.capacity), np.int64)
            for name, buffer in self.cache.buffers():
                self._bind_input(f"past_key_values.{name}", buffer)
                self._bind_output(f"present.{name}", buffer)
            self._unbound = False
        if rows != self._ids.shape[1]:
            self._ids = np.zeros((1, rows), np.int64)
            self._bind_input("input_ids", self._ids)
        if keep != self._logits.shape[1]:
            # Steps that check guesses keep more rows than others: they share one buffer. Larger ones do not stay.
            size = max(keep, _SHARED_ROWS)
            if size != self._room.shape[1]:
                self._room = zeros((1, size, self._model.vocab_size), np.float32)
            self._logits = self._room[:, :keep]
            self._bind_output("logits", self._logits)
        self._keep[0] = keep or _NO_ROWS
        # The one binding of every step, in the way that takes 20 microseconds in place of 55.
        self._binding.bind_cpu_input("attention_mask", self._mask[:, : self.length + rows])

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        # The address of a numpy array: the binding keeps no reference, the arrays are attributes of this object.
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
