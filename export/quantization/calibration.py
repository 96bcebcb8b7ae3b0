"""Ranges of keys and values, for the scales of the INT8 cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...runtime.sessions.in_place import OrtSession

_PIECE_TOKENS = 128

# For "N.key" and "N.value" of each layer N: magnitudes (kv_heads, size) float32.
Ranges = dict[str, NDArray[np.float32]]


def cache_ranges(session: OrtSession, prompts: Iterable[Sequence[int]]) -> Ranges:
    """Largest magnitude of every channel, over all positions of prompts that fit into the context.

    session: of the float32 graph, whose cache holds the keys and values that attention reads.
    """
    largest: Ranges = {}
    for prompt in prompts:
        session.rewind(0)
        for start in range(0, len(prompt), _PIECE_TOKENS):
            session.step(prompt[start : start + _PIECE_TOKENS], 0)
        seen = {name: values.max(axis=1) for name, values in magnitudes(session).items()}
        largest = wider(largest, seen)
    session.rewind(0)
    return largest


def magnitudes(session: OrtSession) -> Ranges:
    """The magnitudes in the cache now: (kv_heads, positions, size) float32 for each buffer."""
    return {
        name: np.abs(np.asarray(buffer[0, :, : session.length], np.float32)) for name, buffer in session.cache.buffers()
    }


def wider(left: Mapping[str, NDArray[np.float32]], right: Mapping[str, NDArray[np.float32]]) -> Ranges:
    """The larger of both ranges for each channel; entries of only one of them are kept."""
    return {**left, **{name: np.maximum(left.get(name, values), values) for name, values in right.items()}}
