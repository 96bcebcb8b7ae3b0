"""`OrtSession`: onnxruntime with bound buffers. A step writes into the KV cache in place, and copies only token ids and
logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Model
from . import kernels
from .graph import load_graph
from .kv_cache import KVCache
from .protocol import KERNELS_PIECE_TOKENS, PIECE_TOKENS, Capabilities
from .rows import OrtRows

# Inside onnxruntime's attention, one row of float32 uses another kernel than several rows, with different last bits.
# With a float32 cache a step therefore always has two rows, unless compiled kernels compute attention. With an int8
# cache both of onnxruntime's kernels give the same bits.
_FLOAT_CACHE_ROWS = 2


class OrtSession:
    """`Session` over onnxruntime: the first of its `rows`. Loading maps the weights and prepares them for this CPU
    (some 0.2 s for 135 MB)."""

    def __init__(
        self,
        graph: Path,
        model: Model,
        threads: int,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        preparing: Path | None = None,
        *,
        use: kernels.Use | None = None,
    ) -> None:
        """graph: path of the ONNX file, whose weights lie beside it; preparing: as `load_graph`; use: what kernels
        compute of the graph, None to look.

        Raises: SessionError.
        """
        self._model = model
        use = use or kernels.use_in(graph, providers[0])
        self._inference = load_graph(graph, threads, providers, preparing, use=use)
        # Some operators of onnxruntime do not accept 0 rows: if it computes layers, a step has at least one row of
        # logits.
        self._least_kept = 0 if use.compute_layers else 1
        # Without kernels, keys and values have no scales of their own.
        self._scale_bytes = model.kv.scale_bytes if use.attend else 0
        self._least_rows = _FLOAT_CACHE_ROWS if model.kv.type == "float32" and not use.attend else 1
        self._rows = self.rows()
        piece_tokens = KERNELS_PIECE_TOKENS if use.attend else PIECE_TOKENS
        self.capabilities = Capabilities(piece_tokens, self._least_rows, rows=self._rows, blocks=self._rows)

    @property
    def cache(self) -> KVCache:
        """The KV cache of all rows."""
        return self._rows.cache

    @property
    def length(self) -> int:
        return self._rows.length(0)

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        return self._rows.feed(0, token_ids, keep)

    def expect(self, positions: int) -> None:
        self.cache.expected = positions

    def can_rewind(self, length: int) -> bool:
        return self._rows.can_rewind(0, length)

    def rewind(self, length: int) -> None:
        self._rows.rewind(0, length)

    def rows(self) -> OrtRows:
        """Rows over the same graph, in a cache of their own."""
        return OrtRows(
            self._inference,
            self._model,
            scale_bytes=self._scale_bytes,
            least_rows=self._least_rows,
            least_kept=self._least_kept,
        )

    def close(self) -> None:
        self._rows.close()
        self._inference = None
