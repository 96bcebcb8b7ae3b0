"""`Session` over a graph that returns its cache grown: past keys and values in, past and new ones out.

The way of models whose attention is not fused, and of most files that other exporters write. A step copies the cache
once, inside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SessionError
from .manifest import Model
from .ort import onnxruntime_errors

_PAST, _PRESENT = "past_key_values.", "present."
_KV_KINDS = ("key", "value")
_LENGTH_AXIS = 2


class ConcatSession:
    """See the module. Not safe between threads. Rewinding copies what is kept; a model with other states than keys and
    values can only go back to the beginning."""

    def __init__(self, inference: Any, model: Model) -> None:
        """inference: onnxruntime's session, from `session.load_graph`."""
        self._inference = inference
        self._model = model
        self._inputs = {item.name for item in inference.get_inputs()}
        self._outputs = [item.name for item in inference.get_outputs()]
        self._errors = onnxruntime_errors()
        self._state = self._beginning()
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        size = self._model.step_tokens or len(token_ids)
        rows: list[NDArray[np.float32]] = []
        for begin in range(0, len(token_ids), size):
            piece = token_ids[begin : begin + size]
            wanted = min(len(piece), keep - (len(token_ids) - begin - len(piece)))
            logits = self._run(piece, max(1, wanted))
            rows += [logits] if wanted > 0 else []
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def can_rewind(self, length: int) -> bool:
        return length in (0, self._length) or (0 < length < self._length and not self._model.states)

    def rewind(self, length: int) -> None:
        if not self.can_rewind(length):
            raise ValueError(f"cannot rewind a session of {self._length} positions to {length}")
        if length == 0:
            self._state = self._beginning()
        elif length < self._length:
            self._state = {name: np.ascontiguousarray(array[:, :, :length]) for name, array in self._state.items()}
        self._length = length

    def close(self) -> None:
        self._inference = None
        self._state = {}

    def _run(self, token_ids: Sequence[int], keep: int) -> NDArray[np.float32]:
        total = self._length + len(token_ids)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "logits_to_keep": np.array([keep], np.int64),
            **{_PAST + name: array for name, array in self._state.items()},
        }
        feeds = {name: array for name, array in feeds.items() if name in self._inputs}
        try:
            results = dict(zip(self._outputs, self._inference.run(self._outputs, feeds), strict=True))
        except self._errors as error:
            reason = " ".join(str(error).split())
            raise SessionError(
                f"a step of {len(token_ids)} tokens at position {self._length} failed: {reason}; "
                "export the bundle again"
            ) from error
        self._state = {name: results[_PRESENT + name] for name in self._state}
        self._length = total
        return np.asarray(results["logits"][0, -keep:], np.float32)

    def _beginning(self) -> dict[str, NDArray[np.float32]]:
        """Keys and values of no positions, and states of zeros."""
        state: dict[str, NDArray[np.float32]] = {}
        for index, layer in enumerate(self._model.layers):
            for kind in _KV_KINDS if layer is not None else ():
                assert layer is not None
                size = layer.key_size if kind == "key" else layer.value_size
                state[f"{index}.{kind}"] = np.zeros((1, layer.kv_heads, 0, size), np.float32)
        for tensor in self._model.states:
            state[tensor.name] = np.zeros((1, *tensor.shape), np.float32)
        return state
