"""Measure how fast the processor reads memory. This limits decoding: each token reads all weights once."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .memory import available_bytes

# More than the caches of processors hold, and less than the memory of a small board.
_MOST_BYTES, _SHARE = 256 << 20, 4
_SECONDS = 2.0


def read_bytes_per_s(threads: int) -> float:
    """Bytes a second that so many threads read together, the median over 2 seconds. Memory: at most 256 MiB, and at
    most a quarter of what is free."""
    count = max(1, min(_MOST_BYTES, available_bytes() // _SHARE) // threads // 8)
    parts = [np.ones(count, np.int64) for _ in range(threads)]
    speeds: list[float] = []
    end = time.perf_counter() + _SECONDS
    with ThreadPoolExecutor(threads) as pool:
        while not speeds or time.perf_counter() < end:
            started = time.perf_counter()
            list(pool.map(np.ndarray.max, parts))  # numpy releases the GIL
            speeds.append(8 * count * threads / (time.perf_counter() - started))
    return statistics.median(speeds)
