"""Tiny random models of transformers' causal model types, shrunk by rule, and how export treats each type.

Sizes are set on a configuration class under their common names, as far as it has them.
"""

from __future__ import annotations

from typing import Any

from edgelm.export.tracing.ways import FUSED, PLAIN, STEPWISE

VOCABULARY = 257
CONTEXT = 320
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


_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA: dict[str, Any] = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_GATED_DELTA: dict[str, Any] = {
    **_HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Settings that a type needs beyond or instead of the common sizes; None removes one.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**{name: value for name, value in _MAMBA.items() if name != "layer_types"}, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "first_k_dense_replace": 1},
    "dots1": {
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "falcon": {"head_dim": None, "initializer_range": 0.3},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_next": _GATED_DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": WINDOW},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 512},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
}


# Types whose bundles give the tokens of transformers' generate, on the path named.
SAME: dict[str, str] = {
    "afmoe": FUSED,
    "apertus": FUSED,
    "arcee": FUSED,
    "biogpt": FUSED,
    "bitnet": FUSED,
    "bloom": PLAIN,
    "codegen": PLAIN,
    "cohere": FUSED,
    "cohere2": FUSED,
    "cwm": FUSED,
    "deepseek_v3": FUSED,
    "diffllama": PLAIN,
    "ernie4_5": FUSED,
    "exaone4": FUSED,
    "falcon": PLAIN,
    "gemma": FUSED,
    "gemma2": FUSED,
    "gemma3_text": FUSED,
    "gemma3n_text": FUSED,
    "gemma4_text": FUSED,
    "glm": FUSED,
    "glm4": FUSED,
    "gpt2": FUSED,
    "gpt_bigcode": FUSED,
    "gpt_neo": PLAIN,
    "gpt_neox": FUSED,
    "gpt_oss": FUSED,
    "gptj": PLAIN,
    "granite": FUSED,
    "granitemoe": FUSED,
    "helium": FUSED,
    "hunyuan_v1_dense": FUSED,
    "internlm3": FUSED,
    "jais2": FUSED,
    "lfm2": PLAIN,
    "llama": FUSED,
    "mamba2": STEPWISE,
    "ministral": FUSED,
    "ministral3": FUSED,
    "mistral": FUSED,
    "mixtral": FUSED,
    "mpt": STEPWISE,
    "nanochat": FUSED,
    "nemotron": FUSED,
    "olmo": FUSED,
    "olmo2": FUSED,
    "olmo3": FUSED,
    "olmoe": FUSED,
    "opt": FUSED,
    "persimmon": FUSED,
    "phi": FUSED,
    "phi3": FUSED,
    "qwen2": FUSED,
    "qwen3": FUSED,
    "qwen3_5_text": STEPWISE,
    "qwen3_moe": FUSED,
    "seed_oss": FUSED,
    "smollm3": FUSED,
    "stablelm": FUSED,
    "starcoder2": FUSED,
    "vaultgemma": FUSED,
    "xglm": PLAIN,
}

# As SAME, for less used types. Their tests take minutes and are marked as slow.
SAME_TOO: dict[str, str] = {
    "aria_text": FUSED,
    "axk1": FUSED,
    "axk2": STEPWISE,
    "bamba": PLAIN,
    "beam": FUSED,
    "cohere2_moe": FUSED,
    "ctrl": FUSED,
    "deepseek_v32": STEPWISE,
    "doge": PLAIN,
    "dots1": FUSED,
    "ernie4_5_moe": FUSED,
    "exaone_moe": FUSED,
    "falcon_h1": STEPWISE,
    "flex_olmo": FUSED,
    "flint": FUSED,
    "glm4_moe": FUSED,
    "glm4_moe_lite": FUSED,
    "glm_moe_dsa": STEPWISE,
    "gpt-sw3": FUSED,
    "gpt_neox_japanese": PLAIN,
    "granite_swa": FUSED,
    "granitemoe_swa": FUSED,
    "granitemoehybrid": PLAIN,
    "granitemoeshared": FUSED,
    "hunyuan_v1_moe": FUSED,
    "hy_v3": FUSED,
    "hy_v4": STEPWISE,
    "hyperclovax": FUSED,
    "iquestcoder": FUSED,
    "jamba": STEPWISE,
    "jetmoe": FUSED,
    "kolibri1": FUSED,
    "laguna": FUSED,
    "lfm2_moe": PLAIN,
    "lfm3": PLAIN,
    "mellum": FUSED,
    "mimo_v2_flash": FUSED,
    "minicpm3": FUSED,
    "minimax_m2": FUSED,
    "minimax_m3_vl_text": FUSED,
    "modernbert-decoder": FUSED,
    "nemotron_h": PLAIN,
    "olmo_hybrid": STEPWISE,
    "phimoe": FUSED,
    "qwen2_moe": FUSED,
    "qwen3_5_moe_text": STEPWISE,
    "qwen3_next": STEPWISE,
    "solar_open": FUSED,
    "trocr": PLAIN,
    "youtu": FUSED,
}

# Types that cannot be exported, with the reason as docs/models.md gives it. Their tests are marked as slow.
REFUSED: dict[str, str] = {
    "deepseek_v2": "torch's exporter fails to convert it on each path (ConversionError)",
    "deepseek_v4": "loops over tokens; token by token the graph lacks a tensor of its cache",
    "falcon_mamba": "loops over tokens; token by token it gives other tokens than torch",
    "hrm_text": "its logits come out too far from torch's",
    "inkling2_text": "torch.export fails on the plain path (TorchExportError)",
    "inkling_text": "torch.export fails on the plain path (TorchExportError)",
    "llama4_text": "torch's exporter fails to convert it on each path (ConversionError)",
    "longcat_flash": "torch.export fails on each path (TorchExportError)",
    "mamba": "loops over tokens; token by token it gives other tokens than torch",
    "minimax": "takes no cache but its own (ValueError)",
    "moshi": "other tokens than generate's on each path, with logits of the prompt that are torch's",
    "openai-gpt": "leaves nothing in transformers' cache",
    "recurrent_gemma": "loops over tokens; token by token torch.export fails (TorchExportError)",
    "rwkv": "loops over tokens, and leaves nothing in transformers' cache",
}

# Types that are not tried, by reason.
_UNTRIED: dict[str, tuple[str, ...]] = {
    "an encoder first, which transformers also lists as a decoder": (
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ),
    "an encoder-decoder": (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "whisper",
    ),
    "more than a text decoder; its text part is tried by itself where it has a type": (
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "git",
        "got_ocr2",
        "llama4",
        "mllama",
        "moss_transcribe_diarize",
        "musicgen",
        "musicgen_melody",
        "phi4_multimodal",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
    ),
    "drafts tokens for another model, whose cache it reads": (
        "gemma4_assistant",
        "gemma4_unified_assistant",
    ),
    "no tiny model of it was built yet": (
        "bailing_hybrid",
        "blt",
        "cohere_compass_text",
        "cpmant",
        "dbrx",
        "dots3_note_text",
        "gemma4_unified_text",
        "kimi_linear",
        "qwen4_exp_text",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ),
}
NOT_TRIED = {name: reason for reason, names in _UNTRIED.items() for name in names}


def causal_types() -> list[str]:
    """Model types that transformers maps to a causal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> Any:
    """A random float32 model of two layers, whose biases and norm weights differ from their initial values."""
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
    """The type's own configuration with the sizes above, as far as it has them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    usual, own = kind(), _OVERRIDES.get(model_type, {})
    sizes = {
        name: value for name, value in _SIZES.items() if name not in own and getattr(usual, name, None) is not None
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        sizes[name] = 256
    if getattr(usual, "num_key_value_heads", None) == getattr(usual, "num_attention_heads", 0):
        sizes["num_key_value_heads"] = 4
    if getattr(usual, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    return kind(**sizes, **{name: value for name, value in own.items() if value is not None})
