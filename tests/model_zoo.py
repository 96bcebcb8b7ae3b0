"""Tiny random models of transformers' causal model types, shrunk by rule, and what export does with each.

Sizes are set where a configuration class has them under their common names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 257
CONTEXT = 160
WINDOW = 16
_MOST_PARAMETERS = 4_000_000

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


@dataclass(frozen=True)
class Refusal:
    """What people read, and the part of the error's message that a test looks for."""

    reason: str
    error: str


# Give the tokens of transformers' generate.
SAME: tuple[str, ...] = (
    "afmoe",
    "apertus",
    "arcee",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoe",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmoe",
    "phi",
    "qwen2",
    "qwen3_moe",
)

# Cannot be exported.
REFUSED: dict[str, Refusal] = {
    "diffllama": Refusal("calls attention more than once in a layer", "more than once"),
    "minimax": Refusal("needs a cache of its own, for linear attention", "cache of its own"),
}


def causal_types() -> list[str]:
    """Model types that transformers maps to a causal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> Any:
    """A random model of two layers, float32, whose biases and norm weights are not what they are initialized to."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert count <= _MOST_PARAMETERS, f"{model_type} is not tiny: {count:,} parameters"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_config(model_type: str) -> Any:
    """The type's own configuration with the sizes above, where it has them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    sizes = {name: value for name, value in _SIZES.items() if getattr(usual, name, None) is not None}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        sizes[name] = 256
    if getattr(usual, "num_key_value_heads", None) == getattr(usual, "num_attention_heads", 0):
        sizes["num_key_value_heads"] = 4
    if getattr(usual, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    return kind(**sizes)
