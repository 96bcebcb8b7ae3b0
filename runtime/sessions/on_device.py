"""`Session` on a GPU: keys and values stay in its memory, and greedy decoding copies token ids there and one id back.

The buffers are onnxruntime's own values on the device, bound as past and as present, so that a step writes into them.
The attention mask is a device buffer of ones, of which a step binds as many as it needs. Logits are copied to the host
only by `step`; `likeliest` leaves them on the device and reads the graph's output `next_tokens`.

On CUDA, a greedy step of one token is captured as a CUDA graph and replayed (`CapturedStep`).

It also runs on the CPU provider, with device "cpu": so it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Model
from ..host.ort import load_onnxruntime, onnxruntime_errors
from .binding import Binding
from .kv_cache import DeviceCache
from .protocol import Capabilities
from .providers import mapped_step_error

# Prompts are fed in pieces, which limits the memory of a step. A GPU needs many tokens at once to be fast.
_PIECE_TOKENS = 2048
_LOGITS, _TOKENS = "logits", "next_tokens"
_REPAIR = "export the model again, and check that onnxruntime-gpu is as new as the onnxruntime that exported it"

# onnxruntime's name for a run that is neither recorded nor replayed.
_NOT_CAPTURED = -1


class DeviceSession:
    """See the module. Not safe between threads."""

    def __init__(self, inference: Any, captures: bool, model: Model, device: str) -> None:
        """inference: onnxruntime's session over a graph with `next_tokens`; captures: whether it can capture runs as
        CUDA graphs; device: "cuda", or "cpu" for tests."""
        self._inference = inference
        self.captures = captures
        self.device = device
        self._model = model
        self._errors = onnxruntime_errors()
        self._cache = DeviceCache(model, device)
        # One binding for each output: onnxruntime computes both, but copies only what is bound.
        self._bindings = {name: Binding(inference, device) for name in (_LOGITS, _TOKENS)}
        self._options = run_options(None)
        self._captured = CapturedStep(inference, device, _TOKENS)
        self._length = 0
        self.capabilities = Capabilities(_PIECE_TOKENS, device=device, picks=self)

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
        """Do nothing: reserving for the expected length could fail where the text itself still fits."""

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
                self._compute(output, token_ids, total, result)
        except self._errors as error:
            doing = f"a step of {len(token_ids)} tokens at position {self._length}"
            raise mapped_step_error(str(error), doing, _REPAIR) from error
        self._length = total

    def _compute(self, output: str, token_ids: Sequence[int], total: int, result: NDArray[Any]) -> None:
        """total: positions with these tokens; result: (1, keep, ...), is filled."""
        binding, cache = self._bindings[output], self._cache
        binding.device_cache(cache)
        binding.put_once("input_ids", np.array([token_ids], np.int64))
        binding.put_once("logits_to_keep", np.array([result.shape[1]], np.int64))
        binding.put_value("attention_mask", cache.mask, (1, total))
        binding.take(output, result)
        binding.run(self._options)


def run_options(graph: int | None) -> Any:
    """Settings of a run: the number of the graph that it is recorded as, or replays, or None for neither."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(_NOT_CAPTURED if graph is None else graph))
    return options


class CapturedStep:
    """A greedy step of one token as a CUDA graph: all kernel launches are recorded once and then replayed as one, which
    saves the time of launching hundreds of small kernels in each step.

    A replay has the addresses and shapes of the recorded run. So the mask is as long as the cache's buffers, and its
    zeros at the end tell the kernels how many positions there are. Mask and token id are copied to the same addresses
    before each step. When the cache's buffers move, a step is recorded again. On the CPU provider the same step runs
    without a graph.
    """

    def __init__(self, inference: Any, device: str, output: str) -> None:
        """inference: onnxruntime's session, made to capture; output: the graph's output of token ids (1, 1)."""
        self._inference = inference
        self._device = device
        self._output = output
        self._graphs = 0
        self._bound: Any = None

    def run(self, cache: DeviceCache, token: int, total: int) -> int:
        """total: positions including this token. Returns: the next token."""
        if self._bound is not cache.mask:
            self._bind(cache)
        self._ids.update_inplace(np.array([[token]], np.int64))
        self._ones[0, :total], self._ones[0, total:] = 1, 0
        self._mask.update_inplace(self._ones)
        self._inference.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return int(self._next.numpy()[0, 0])

    def _bind(self, cache: DeviceCache) -> None:
        """Bind the buffers that a recorded step reads and writes, as the cache has them now."""
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
