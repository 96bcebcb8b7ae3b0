"""Ranges of the keys and values on a text, for the scales of the INT8 cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime.session import OrtSession

_PIECE_TOKENS = 128


def cache_ranges(session: OrtSession, token_ids: Sequence[int], window: int) -> dict[str, NDArray[np.float32]]:
    """Largest magnitude of every channel, over all positions of a text that is fed in windows.

    session: of the float32 graph, whose cache holds what attention would read. Returns: (kv_heads, size) float32 for
    "N.key" and "N.value" of each layer N.
    """
    largest: dict[str, NDArray[np.float32]] = {}
    for begin in range(0, len(token_ids), window):
        part = token_ids[begin : begin + window]
        session.rewind(0)
        for start in range(0, len(part), _PIECE_TOKENS):
            session.step(part[start : start + _PIECE_TOKENS])
        for name, buffer in session.cache.buffers():
            seen = np.abs(buffer[0, :, : session.length]).max(axis=1)
            largest[name] = np.maximum(largest.get(name, seen), seen)
    session.rewind(0)
    return largest
