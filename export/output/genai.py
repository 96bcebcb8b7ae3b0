"""Files with which onnxruntime-genai opens a bundle: a second graph over the same weights, and `genai_config.json`.

The graph is the bundle's own, with logits of the last token only, as onnxruntime-genai expects. It reads the type of
the KV cache from the graph, so INT8 caches work too. It has one shape for the caches of all layers, so only models
whose layers are alike get these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.bundle import folder as names
from ...runtime.bundle.manifest import Model, Tokens
from ..passes.attention_functions import ATTENTION_TEXTS
from ..passes.last_logits_only import LastLogitsOnly
from .package import write_json

GENAI_GRAPH_NAME = "model.genai.onnx"
GENAI_CONFIG_NAME = "genai_config.json"
# onnxruntime-genai allocates the cache for `max_length` before the first token: with a context of 131,072 that would be
# gigabytes that a chat never uses. Programs that need more can set it.
_DEFAULT_MAX_LENGTH = 4096


def write_genai_files(folder: Path, model: Model, tokens: Tokens) -> str | None:
    """Write both files, or none, into a folder with the bundle's graph and weights.

    Returns: None, or why onnxruntime-genai cannot run this model. Cost: reading and writing the graph without weights.
    Raises: OSError.
    """
    reason = why_irregular(model)
    if reason is not None:
        return reason
    # Weights are not read: both graphs only refer to the weights file.
    graph = ir.load(folder / names.GRAPH_NAME)
    LastLogitsOnly()(graph)
    _fix_rows(graph, model)
    ir.save(graph, folder / GENAI_GRAPH_NAME)
    attention = next(node for node in graph.graph if node.op_type in ATTENTION_TEXTS)
    heads = attention.attributes["num_heads"].as_int()
    write_json(folder / GENAI_CONFIG_NAME, genai_config(model, tokens, heads))
    return None


def _fix_rows(graph: ir.Model, model: Model) -> None:
    """Set the cache's last axis to the head size: onnxruntime-genai allows no scales behind the values."""
    layer = model.layers[0]
    assert layer is not None, "a regular model has attention in every layer"
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")):
            assert value.shape is not None, "a cache has a shape"
            value.shape = ir.Shape([*value.shape[:-1], layer.key_size])


def why_irregular(model: Model) -> str | None:
    """Why one shape does not describe the caches of all layers; None if it does."""
    if model.cache_layout != "in_place" or model.states:
        return "its attention is not fused, or it keeps other states, which onnxruntime-genai does not expect here"
    first = model.layers[0]
    for index, layer in enumerate(model.layers):
        if layer is None or first is None:
            return (
                f"layer {index if layer is None else 0} has no attention, onnxruntime-genai expects it in every layer"
            )
        if layer.key_size != layer.value_size:
            return (
                f"layer {index} has keys of size {layer.key_size} and values of size {layer.value_size}, "
                "onnxruntime-genai knows one size for both"
            )
        if (layer.kv_heads, layer.key_size) != (first.kv_heads, first.key_size):
            return (
                f"layer {index} caches {layer.kv_heads} heads of size {layer.key_size}, layer 0 {first.kv_heads} of "
                f"{first.key_size}, onnxruntime-genai knows one shape for all layers"
            )
    return None


def genai_config(model: Model, tokens: Tokens, attention_heads: int) -> dict[str, Any]:
    """The content of `genai_config.json` for a model whose layers are alike. Decoding is greedy, as is our default."""
    layer = model.layers[0]
    assert layer is not None, "a regular model has attention in every layer"
    ids = {"bos_token_id": tokens.bos, "eos_token_id": list(tokens.eos), "pad_token_id": tokens.pad}
    decoder = {
        "filename": GENAI_GRAPH_NAME,
        # Needed for right answers on x86 CPUs without VNNI, whose INT8 kernels overflow. Our runtime sets it only
        # there, but this file cannot ask the CPU; with VNNI it doubles the time of long prompts. It has no effect
        # without INT8 weights, and on Arm.
        "session_options": {"session.x64quantprecision": "1"},
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention_heads,
        "num_key_value_heads": layer.kv_heads,
        "head_size": layer.key_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            **{key: value for key, value in ids.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": min(model.context_length, _DEFAULT_MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }
