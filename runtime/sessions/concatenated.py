"""`Session` over a graph with a concatenated cache: past keys and values in, past and new ones out.

Used for models whose attention is not fused, and for files of other exporters. A step copies the cache once, inside the
graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Model
from ..errors import SessionError
from ..host.ort import onnxruntime_errors
from .graph import REPAIR
from .protocol import Capabilities
from .providers import mapped_step_error

_PAST, _PRESENT = "past_key_values.", "present."
# Inputs besides the cache that graphs have, ours and those of other exporters.
_LOGITS_TO_KEEP = ("logits_to_keep", "num_logits_to_keep")
_USE_CACHE = "use_cache_branch"
_INPUTS = {"input_ids", "attention_mask", "position_ids", _USE_CACHE, *_LOGITS_TO_KEEP}
_CACHE_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_KV_KINDS = ("key", "value")
_KV_INPUT = re.compile(r"past_key_values\.\d+\.(key|value)", re.ASCII)


class ConcatSession:
    """See the module. Not safe between threads. Rewinding copies what is kept. A model with states besides keys and
    values can only be rewound to the beginning."""

    def __init__(self, inference: Any, model: Model, first: Any = None) -> None:
        """inference: onnxruntime's session, from `graph.load_graph`; first: the session for a text's first step, if
        that has a graph of its own."""
        self._inference = inference
        self._first = first or inference
        self._model = model
        self._inputs = {item.name: item for item in inference.get_inputs()}
        # If the first step has a graph or a branch of its own, the other was traced with one token, and may lack the
        # mask between several.
        self._one_by_one = first is not None or _USE_CACHE in self._inputs
        self._errors = onnxruntime_errors()
        self._state = self._beginning()
        self._length = 0
        self.capabilities = Capabilities()

    @property
    def length(self) -> int:
        return self._length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        size = 1 if self._one_by_one and self._length else self._model.step_tokens or len(token_ids)
        rows: list[NDArray[np.float32]] = []
        for begin in range(0, len(token_ids), size):
            piece = token_ids[begin : begin + size]
            wanted = min(len(piece), keep - (len(token_ids) - begin - len(piece)))
            logits = self._run(piece, max(1, wanted))
            rows += [logits] if wanted > 0 else []
        if not rows:
            return np.empty((0, self._model.vocab_size), np.float32)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def expect(self, positions: int) -> None:
        """Do nothing: the graph makes a new cache in each step."""

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
        self._inference = self._first = None
        self._state = {}

    def _run(self, token_ids: Sequence[int], keep: int) -> NDArray[np.float32]:
        inference = self._inference if self._length else self._first
        feeds = self._feeds(token_ids, keep)
        outputs = [item.name for item in inference.get_outputs()]
        try:
            feeds = {item.name: feeds[item.name] for item in inference.get_inputs()}
            results = dict(zip(outputs, inference.run(outputs, feeds), strict=True))
        except self._errors as error:
            doing = f"a step of {len(token_ids)} tokens at position {self._length}"
            raise mapped_step_error(str(error), doing, REPAIR) from error
        logits = results["logits"][0, -keep:]
        if len(logits) < keep:
            raise SessionError(
                f"the graph gave logits of {len(logits)} tokens where {keep} are needed: it can generate, but not score"
            )
        self._state = {name: results[_PRESENT + name] for name in self._state}
        self._length += len(token_ids)
        return np.asarray(logits, np.float32)

    def _feeds(self, token_ids: Sequence[int], keep: int) -> dict[str, NDArray[Any]]:
        """Values for every input that a graph may have."""
        total = self._length + len(token_ids)
        counts = {
            name: np.full([1] * len(self._inputs[name].shape), keep, np.int64)
            for name in _LOGITS_TO_KEEP
            if name in self._inputs
        }
        return {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            _USE_CACHE: np.array([self._length > 0]),
            **counts,
            **{_PAST + name: array for name, array in self._state.items()},
        }

    def _beginning(self) -> dict[str, NDArray[Any]]:
        """The empty cache: keys and values without positions, states of zeros."""
        state: dict[str, NDArray[Any]] = {}
        for index, layer in enumerate(self._model.layers):
            for kind in _KV_KINDS if layer is not None else ():
                assert layer is not None
                size = layer.key_size if kind == "key" else layer.value_size
                state[f"{index}.{kind}"] = np.zeros((1, layer.kv_heads, 0, size), self._dtype(f"{index}.{kind}"))
        for tensor in self._model.states:
            state[tensor.name] = np.zeros((1, *tensor.shape), self._dtype(tensor.name))
        return state

    def _dtype(self, name: str) -> np.dtype[Any]:
        return _CACHE_DTYPES[self._inputs[_PAST + name].type]


def known_input(name: str) -> bool:
    """Whether a session knows an input of this name, for a model whose only states are keys and values."""
    return name in _INPUTS or _KV_INPUT.fullmatch(name) is not None
