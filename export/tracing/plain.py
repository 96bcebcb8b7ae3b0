"""torch module to ONNX graph, the plain way: attention as the model writes it, the cache as inputs and outputs.

For models whose attention does not go through transformers' registry, or that keep other state than keys and values
(convolutions, recurrences). A real cache of transformers is filled with the graph's inputs, the model runs on it, and
what the cache holds afterwards are the outputs: keys and values grown by concatenation, states replaced.
No architecture is named here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...runtime.bundle.manifest import LayerCache, StateTensor
from ..errors import TraceError, reason_of
from ..source.loading import cache_argument
from .attention import TracedModel
from .experts import traceable_experts
from .exporter import name_weights, quiet_exporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

# Sizes for the trace, different and above 1: torch would merge equal ones, and treat 1 as a constant.
_BATCH, _NEW, _PAST = 2, 3, 5
# Lengths of several chunks of a recurrence (64 or 128 tokens are usual), with different numbers of chunks.
_LENGTHS = (131, 259)
_KV = ("key", "value")
_STATES = ("conv", "recurrent")


@dataclass(frozen=True)
class _Slot:
    """One tensor of a cache: its layer, its kind ("key", "value", "conv", "recurrent"), and its number."""

    layer: int
    kind: str
    index: int = 0

    @property
    def name(self) -> str:
        """The suffix of `past_key_values.` and `present.`."""
        return f"{self.layer}.{self.kind}" + (f".{self.index}" if self.index else "")

    def read(self, cache: DynamicCache) -> torch.Tensor | None:
        """The tensor in a cache, or None if it is not there yet."""
        layer: Any = cache.layers[self.layer]
        if self.kind in _KV:
            found = getattr(layer, f"{self.kind}s", None)
        else:
            found = getattr(layer, f"{self.kind}_states", {}).get(self.index)
        return found if isinstance(found, torch.Tensor) else None

    def write(self, cache: DynamicCache, tensor: torch.Tensor) -> None:
        """Put a tensor into a cache, as after earlier tokens."""
        layer: Any = cache.layers[self.layer]
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if self.kind in _KV:
            setattr(layer, f"{self.kind}s", tensor)
            layer.is_initialized = True
            return
        # A copy: layers write into their states, which torch.export does not allow for inputs.
        getattr(layer, f"{self.kind}_states")[self.index] = tensor.clone()
        getattr(layer, f"is_{self.kind}_states_initialized")[self.index] = True
        layer.has_previous_state[self.index] = True
        if self.kind == "conv":
            layer.conv_kernel_size[self.index] = tensor.shape[-1]


class _Traceable(torch.nn.Module):
    """The model with the bundle's inputs and outputs."""

    def __init__(self, model: PreTrainedModel, slots: Sequence[_Slot]) -> None:
        super().__init__()
        self.model = model
        self._slots = slots

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = _empty_cache(self.model)
        for slot, tensor in zip(self._slots, past, strict=True):
            slot.write(cache, tensor)
        new = input_ids.shape[1]
        positions = attention_mask.sum(1, keepdim=True) - new + torch.arange(new)
        logits = _run(self.model, cache, input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        return logits, [self._left(slot, cache) for slot in self._slots]

    def _left(self, slot: _Slot, cache: DynamicCache) -> torch.Tensor:
        tensor = slot.read(cache)
        if tensor is None:
            raise TraceError(f"{type(self.model).__name__} does not leave past_key_values.{slot.name} in its cache")
        return tensor


def trace_plain(model: PreTrainedModel, step_tokens: int | None = None) -> TracedModel:
    """Trace a model in evaluation mode, float32, with a cache that the graph concatenates.

    step_tokens: None for any number of new tokens a step, or 1 for models that can go on from a state only token by
    token. Inputs and outputs as `trace.trace_model`, with the layers' other states as past_key_values.N.conv and the
    like, of fixed shapes. Raises: TraceError.
    """
    with _eager_attention(model), traceable_experts(model), quiet_exporter():
        try:
            if step_tokens is None:
                _require_same_operations(model)
            examples = _probe(model)
            graph = _export(model, examples, step_tokens).model
        except TraceError:
            raise
        except Exception as error:  # torch.export raises whatever modeling code and its own layers raise
            raise TraceError(f"{type(model).__name__} cannot be traced: {reason_of(error)}") from error
    lost = [
        slot.name for slot in examples if f"present.{slot.name}" not in {value.name for value in graph.graph.outputs}
    ]
    if lost:
        raise TraceError(f"{type(model).__name__} cannot be traced: its graph does not return the cache's {lost[0]}")
    name_weights(graph)
    return TracedModel(
        graph,
        layers=_layers(model, examples),
        layout="concatenated",
        states=tuple(
            StateTensor(slot.name, tuple(int(size) for size in tensor.shape[1:]), "float32")
            for slot, tensor in examples.items()
            if slot.kind in _STATES
        ),
        step_tokens=step_tokens,
    )


def _export(model: PreTrainedModel, examples: dict[_Slot, torch.Tensor], step_tokens: int | None) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    new = step_tokens or _NEW
    names = [slot.name for slot in examples]
    return torch.onnx.export(
        _Traceable(model, list(examples)).eval(),
        (
            torch.ones(_BATCH, new, dtype=torch.int64),
            torch.ones(_BATCH, _PAST + new, dtype=torch.int64),
            list(examples.values()),
        ),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes={
            "input_ids": {0: dynamic} if step_tokens else {0: dynamic, 1: dynamic},
            "attention_mask": {0: dynamic, 1: dynamic},
            "past": [{0: dynamic, 2: dynamic} if slot.kind in _KV else {0: dynamic} for slot in examples],
        },
    )


def _probe(model: PreTrainedModel) -> dict[_Slot, torch.Tensor]:
    """Run the model once on a few tokens. Returns copies of the tensors in its cache."""
    cache = _empty_cache(model)
    ids = torch.zeros(_BATCH, _PAST, dtype=torch.int64)
    with torch.no_grad():
        _run(model, cache, input_ids=ids, attention_mask=torch.ones_like(ids))
    found = {}
    for layer, content in enumerate(cache.layers):
        slots = [_Slot(layer, kind) for kind in _KV]
        slots += [_Slot(layer, kind, index) for kind in _STATES for index in getattr(content, f"{kind}_states", {})]
        found.update({slot: tensor.clone() for slot in slots if (tensor := slot.read(cache)) is not None})
    if not found:
        raise TraceError(f"{type(model).__name__} leaves nothing in transformers' cache: this edgelm cannot export it")
    return found


def _require_same_operations(model: PreTrainedModel) -> None:
    """Raise TraceError if modeling code loops over tokens: a trace unrolls such a loop for one length, which takes
    minutes and is wrong for other lengths. Cost: two runs of some hundred tokens."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(_LENGTHS)
    lengths = [min(length, longest) for length in _LENGTHS]
    counts = [_count_operations(model, length) for length in lengths]
    if len(set(counts)) > 1:
        raise TraceError(
            f"{type(model).__name__} loops over tokens: it computes {lengths[0]} of them in {counts[0]} operations and "
            f"{lengths[1]} in {counts[1]}"
        )


def _count_operations(model: PreTrainedModel, length: int) -> int:
    ids = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad(), _Counter() as counter:  # type: ignore[no-untyped-call]
        _run(model, _empty_cache(model), input_ids=ids, attention_mask=torch.ones_like(ids))
    return int(counter.count)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch runs."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _run(model: PreTrainedModel, cache: DynamicCache, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of a call with the inputs that the model accepts."""
    known = inspect.signature(model.forward).parameters
    inputs = {key: value for key, value in inputs.items() if key in known}
    logits: torch.Tensor = model(use_cache=True, **{cache_argument(model): cache}, **inputs).logits
    return logits


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' cache for a model without sliding windows: the mask implements them, and the graph cannot follow
    the length of a cache that drops tokens."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    full: Any = DynamicLayer
    cache.layers = [full() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def _layers(model: PreTrainedModel, examples: dict[_Slot, torch.Tensor]) -> tuple[LayerCache | None, ...]:
    shapes = {(slot.layer, slot.kind): tensor.shape for slot, tensor in examples.items()}
    count = max(getattr(model.config.get_text_config(), "num_hidden_layers", 0), *(slot.layer + 1 for slot in examples))
    return tuple(
        LayerCache(int(key[1]), int(key[3]), int(shapes[layer, "value"][3]), None)
        if (key := shapes.get((layer, "key"))) is not None
        else None
        for layer in range(count)
    )


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use attention in plain operations during the block: fused ones have no ONNX form for every mask."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
