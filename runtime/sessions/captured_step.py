"""A greedy step of one token as a CUDA graph: the launches of all its kernels are recorded once, and then replayed as
one, which takes the time of launching hundreds of small kernels out of each step.

A replay reads and writes the addresses of the recorded run, and has its shapes. So the mask is as long as the cache's
buffers, with zeros at its end, where the kernels read how many positions there are; it and the token's id are copied to
the same place before each step. When the cache's buffers move, a step is recorded anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..host.ort import load_onnxruntime
from .kv_cache import DeviceCache

# onnxruntime's name for a run that is neither recorded nor replayed.
_NOT_CAPTURED = -1


def run_options(graph: int | None) -> Any:
    """Settings of a run: the number of the graph that it is recorded as, or replays, or None for neither."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(_NOT_CAPTURED if graph is None else graph))
    return options


class CapturedStep:
    """See the module. On the CPU provider it runs the same step, of the same shapes, without a graph."""

    def __init__(self, inference: Any, device: str, output: str) -> None:
        """inference: onnxruntime's session, made to capture; output: the graph's output of token ids (1, 1)."""
        self._inference = inference
        self._device = device
        self._output = output
        self._graphs = 0
        self._bound: Any = None

    def run(self, cache: DeviceCache, token: int, total: int) -> int:
        """total: positions with this token. Returns: the token that follows."""
        if self._bound is not cache.mask:
            self._bind(cache)
        self._ids.update_inplace(np.array([[token]], np.int64))
        self._ones[0, :total], self._ones[0, total:] = 1, 0
        self._mask.update_inplace(self._ones)
        self._inference.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return int(self._next.numpy()[0, 0])

    def _bind(self, cache: DeviceCache) -> None:
        """Places that a recorded step reads and writes, for the buffers that the cache has now."""
        self._graphs += 1
        self._options = run_options(self._graphs)
        self._binding = self._inference.io_binding()
        cache.bind(self._binding)
        self._ones = np.zeros((1, cache.capacity), np.int64)
        self._ids, self._next = self._put(np.zeros((1, 1), np.int64)), self._put(np.zeros((1, 1), np.int64))
        self._mask = self._put(self._ones)
        self._binding.bind_ortvalue_input("input_ids", self._ids)
        self._binding.bind_ortvalue_input("attention_mask", self._mask)
        self._binding.bind_cpu_input("logits_to_keep", np.ones(1, np.int64))
        self._binding.bind_ortvalue_output(self._output, self._next)
        self._bound = cache.mask

    def _put(self, array: Any) -> Any:
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device, 0)
