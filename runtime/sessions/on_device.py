"""`Session` on a GPU: keys and values stay in its memory, and greedy decoding copies token ids there and one id back.

The buffers are onnxruntime's own values on the device, bound as past and as present, so that a step writes into them.
The attention mask is a device buffer of ones, of which a step binds as many as it needs. Logits are copied to the host
when they are asked for (`step`); `likeliest` leaves them where they are and reads the graph's output `next_tokens`.

On CUDA, a greedy step of one token is captured as a CUDA graph and replayed (`captured_step`).

Runs on the CPU provider as well, with device "cpu", which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Model
from ..host.ort import onnxruntime_errors
from .captured_step import CapturedStep, run_options
from .kv_cache import DeviceCache
from .providers import mapped_step_error

# Prompts are fed in pieces, which bound the memory of a step. A GPU wants many tokens at once.
_PIECE_TOKENS = 2048
_LOGITS, _TOKENS = "logits", "next_tokens"
_REPAIR = "export the model again, and check that onnxruntime-gpu is as new as the onnxruntime that exported it"


class DeviceSession:
    """See the module. Not safe between threads."""

    piece_tokens = _PIECE_TOKENS

    def __init__(self, inference: Any, captures: bool, model: Model, device: str) -> None:
        """inference: onnxruntime's session over a graph with `next_tokens`; captures: whether it can capture runs as
        CUDA graphs; device: "cuda", or "cpu" for tests."""
        self._inference = inference
        self.captures = captures
        self.device = device
        self._model = model
        self._errors = onnxruntime_errors()
        self._cache = DeviceCache(model, device)
        # One binding for each output: onnxruntime computes both, and copies only what is bound.
        self._bindings = {name: _Binding(inference, device, name) for name in (_LOGITS, _TOKENS)}
        self._captured = CapturedStep(inference, device, _TOKENS)
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        logits = np.empty((1, max(1, keep), self._model.vocab_size), np.float32)
        self._run(_LOGITS, token_ids, logits)
        return np.asarray(logits[0, :keep])

    def likeliest(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.int64]:
        """Append tokens as `step` does; the most likely token behind each of the last `keep`, the lowest id among
        equals. Nothing else leaves the device. Raises: SessionError, MemoryShortageError."""
        tokens = np.empty((1, max(1, keep)), np.int64)
        self._run(_TOKENS, token_ids, tokens)
        return np.asarray(tokens[0, :keep])

    def expect(self, positions: int) -> None:
        """Nothing: memory of a device is taken whole, and one without room for a guess may have room for the text."""

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self._length

    def rewind(self, length: int) -> None:
        if not self.can_rewind(length):
            raise ValueError(f"cannot rewind a session of {self._length} positions to {length}")
        self._length = length

    def close(self) -> None:
        self._bindings = {}
        self._captured = CapturedStep(None, "cpu", _TOKENS)
        self._inference = None
        self._cache = DeviceCache(self._model, "cpu")
        self._length = 0

    def _run(self, output: str, token_ids: Sequence[int], result: NDArray[Any]) -> None:
        total = self._length + len(token_ids)
        try:
            self._cache.reserve(total, self._length)
            if self.captures and output == _TOKENS and len(token_ids) == 1:
                result[0, 0] = self._captured.run(self._cache, token_ids[0], total)
            else:
                self._bindings[output].run(self._cache, token_ids, total, result)
        except self._errors as error:
            reason = " ".join(str(error).split())
            doing = f"a step of {len(token_ids)} tokens at position {self._length}"
            raise mapped_step_error(reason, doing, _REPAIR) from error
        self._length = total


class _Binding:
    """What the graph reads and writes where one of its outputs is wanted; binds only what changed."""

    def __init__(self, inference: Any, device: str, output: str) -> None:
        self._inference = inference
        self._device = device
        self._output = output
        self._binding = inference.io_binding()
        self._options = run_options(None)
        self._bound: Any = None

    def run(self, cache: DeviceCache, token_ids: Sequence[int], total: int, result: NDArray[Any]) -> None:
        """total: positions with these tokens; result: (1, keep, ...), is filled."""
        binding = self._binding
        if self._bound is not cache.mask:
            cache.bind(binding)
            self._bound = cache.mask
        ids = np.array([token_ids], np.int64)
        keep = np.array([result.shape[1]], np.int64)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("logits_to_keep", keep)
        binding.bind_input("attention_mask", self._device, 0, np.int64, (1, total), cache.mask.data_ptr())
        binding.bind_output(self._output, "cpu", 0, result.dtype.type, result.shape, result.ctypes.data)
        self._inference.run_with_iobinding(binding, self._options)
