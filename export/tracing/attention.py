"""Trace a torch module to an ONNX graph, for any model whose attention uses transformers' attention registry.

transformers calls attention by name from a registry. A function of ours under a name of its own receives every layer's
queries, keys and values, wherever they come from, and emits ONNX Runtime's `GroupQueryAttention` with that layer's KV
cache as input and output. No architecture is named here. A cache stand-in answers what modeling code asks of a cache;
positions are one symbolic node (`edgelm::Positions`), which the pass `lower_positions` writes out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from ...runtime.bundle.manifest import CacheLayout, LayerCache, StateTensor
from ..errors import TraceError, reason_of
from .decompositions import light_decompositions
from .experts import traceable_experts
from .exporter import name_weights, quiet_exporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "edgelm_group_query_attention"
# Sizes for the trace, different and above 1: torch would merge equal ones, and treat 1 as a constant.
_BATCH, _NEW, _PAST = 2, 3, 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TracedModel:
    """The graph with float32 weights (the torch module's, not copied), and the description of its cache.

    layers: each layer's keys and values; layout: "in_place" where a fused operator writes them into one buffer,
    "concatenated" where the graph returns them grown; states: other tensors that a step hands to the next;
    step_tokens: the number of new tokens that a step must have, or None for any.
    """

    graph: ir.Model
    layers: tuple[LayerCache | None, ...]
    layout: CacheLayout = "in_place"
    states: tuple[StateTensor, ...] = ()
    step_tokens: int | None = None


@dataclass
class _Trace:
    """State that the attention function and the module around the model share during one trace."""

    past: dict[int, tuple[torch.Tensor, torch.Tensor]]
    last_positions: torch.Tensor
    total: torch.Tensor
    total_length: int
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class _Probe:
    """Records the shape of each layer's cache during one run on a few tokens."""

    layers: dict[int, LayerCache] = field(default_factory=dict)


_active: _Trace | _Probe | None = None


class _CacheStandIn:
    """Replaces the cache in modeling code during a trace. The attention operator adds the keys and values of earlier
    tokens, so this cache is always empty and returns what it is given."""

    is_compileable = False
    layers: tuple[()] = ()

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return 0, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * 4096


class _Traceable(torch.nn.Module):
    """The model with the bundle's inputs and outputs."""

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        super().__init__()
        self.model = model
        self._layers = layers

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        total = attention_mask.shape[1]
        trace = _Trace(
            past=dict(zip(self._layers, past, strict=True)),
            last_positions=(attention_mask.sum(1) - 1).to(torch.int32),
            total=torch.scalar_tensor(total, dtype=torch.int32),
            total_length=total,
        )
        positions = torch.onnx.ops.symbolic(
            "edgelm::Positions", (input_ids, attention_mask), dtype=torch.int64, shape=tuple(input_ids.shape), version=1
        )
        with _activated(trace):
            logits = self.model(
                input_ids=input_ids, position_ids=positions, past_key_values=_CacheStandIn(), use_cache=True
            ).logits
        return logits, [trace.present[layer] for layer in self._layers]


def trace_model(model: PreTrainedModel) -> TracedModel:
    """Trace a model in evaluation mode, float32.

    Inputs of the graph: input_ids int64 (batch, new), attention_mask int64 (batch, total), past_key_values.N.key and
    .value float32 (batch, kv_heads, past, size). Outputs: logits float32 (batch, new, vocabulary), present.N.key/value.
    Cost: some seconds per ten layers, no copy of the weights. Raises: TraceError.
    """
    with _routed_attention(model), traceable_experts(model), quiet_exporter():
        layers = _probe_layers(model)
        try:
            # Without gradients: otherwise modeling code that switches them off would be traced.
            with torch.no_grad(), light_decompositions():
                program = _export(model, layers)
        except Exception as error:  # torch.export passes on any error of modeling code and of its own layers
            raise TraceError(f"{type(model).__name__} cannot be traced: {reason_of(error)}") from error
    graph = program.model
    name_weights(graph)
    count = max(getattr(model.config, "num_hidden_layers", 0), max(layers) + 1)
    return TracedModel(graph, tuple(layers.get(index) for index in range(count)))


def _export(model: PreTrainedModel, layers: dict[int, LayerCache]) -> Any:
    order = sorted(layers)
    past = [
        (
            torch.zeros(_BATCH, layers[index].kv_heads, _PAST, layers[index].key_size),
            torch.zeros(_BATCH, layers[index].kv_heads, _PAST, layers[index].value_size),
        )
        for index in order
    ]
    batch, new, total, length = (torch.export.Dim(name) for name in ("batch", "new", "total", "past"))
    sides = [f"{index}.{side}" for index in order for side in ("key", "value")]
    return torch.onnx.export(
        _Traceable(model, order).eval(),
        (torch.ones(_BATCH, _NEW, dtype=torch.int64), torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64), past),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{side}" for side in sides)],
        output_names=["logits", *(f"present.{side}" for side in sides)],
        dynamic_shapes={
            "input_ids": {0: batch, 1: new},
            "attention_mask": {0: batch, 1: total},
            "past": [({0: batch, 2: length}, {0: batch, 2: length}) for _ in order],
        },
    )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The registry's function: query (batch, heads, new, size), key and value (batch, kv_heads, new, size)."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch, heads, new, size = query.shape
    kv_heads, value_size = key.shape[1], value.shape[3]
    # The operator has one size for keys and values: the smaller is padded with zeros, as in multi-head latent
    # attention.
    wide = max(size, value_size)
    if isinstance(_active, _Probe):
        if layer in _active.layers:
            raise TraceError(f"layer {layer} calls attention more than once")
        _active.layers[layer] = LayerCache(kv_heads, wide, wide, sliding_window)
        return query.new_zeros(batch, new, heads, value_size), None
    assert isinstance(_active, _Trace), "attention of the exporter was called outside a trace"
    inputs: list[torch.Tensor | None] = [
        *(_flat(_filled(part, wide)) for part in (query, key, value)),
        *_active.past[layer],
    ]
    inputs += [_active.last_positions, _active.total]
    if s_aux is not None:
        inputs += [None, None, None, None, s_aux]
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": kv_heads}
    attributes["scale"] = float(scaling if scaling is not None else size**-0.5)
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    total = _active.total_length
    output, *present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,  # type: ignore[arg-type]
        dtypes=(query.dtype,) * 3,
        shapes=((batch, new, heads * wide), (batch, kv_heads, total, wide), (batch, kv_heads, total, wide)),
        version=1,
    )
    _active.present[layer] = (present[0], present[1])
    output = output.reshape(batch, new, heads, wide)
    return output[..., :value_size] if value_size < wide else output, None


def _filled(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with its last axis padded with zeros."""
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, new, size) to (batch, new, heads * size)."""
    batch, heads, new, size = tensor.shape
    return tensor.transpose(1, 2).reshape(batch, new, heads * size)


def _probe_layers(model: PreTrainedModel) -> dict[int, LayerCache]:
    """Run the model once on a few tokens. Returns each layer's cache by the layer's index."""
    probe = _Probe()
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.int64)
    reason = "no layer calls it"
    try:
        with _activated(probe), torch.no_grad():
            model(input_ids=ids, past_key_values=_CacheStandIn(), use_cache=True)
    except Exception as error:  # noqa: BLE001, modeling code that wants another cache than our stand-in fails in its own ways
        probe.layers.clear()
        reason = reason_of(error)
    if not probe.layers:
        raise TraceError(
            f"{type(model).__name__} does not call transformers' attention registry as others do ({reason}), so its "
            "attention cannot be routed to the fused operator: this edgelm cannot export it"
        )
    return probe.layers


@contextlib.contextmanager
def _routed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make every layer call our attention function. The model is restored at the end of the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
    before = model.config._attn_implementation
    # Our name has no entry in the mask registry, so transformers builds no mask; the operator is causal by itself.
    model.config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextlib.contextmanager
def _activated(state: _Trace | _Probe) -> Iterator[None]:
    # A global: the registry's function has no argument for it, and torch.export runs the model more than once. Exports
    # cannot run in parallel in one process; torch's exporter does not allow it either.
    global _active  # noqa: PLW0603
    before, _active = _active, state
    try:
        yield
    finally:
        _active = before
