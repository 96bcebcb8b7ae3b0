"""Small GGUF files, written with llama.cpp's Python package from models built in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .conftest import tiny_llama

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
END = "<end>"
# Names of Llama's and Qwen2's weights in a GGUF file, below `blk.N.`.
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def wide_llama(**changes: Any) -> Any:
    """The tiny Llama, with rows long enough for blocks of 256."""
    return tiny_llama(
        **{"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1} | changes
    )


def tiny_qwen2() -> Any:
    """A Qwen2 with biases and an untied head."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=256,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
    return model


def tiny_qwen3() -> Any:
    """A Qwen3: it normalizes queries and keys, and its head size is not the default."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=256,
    )
    return Qwen3ForCausalLM(config).eval()


def write_gguf(path: Path, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """Write a model with a tokenizer of single bytes. kind: the type of its matrices; changes: as in `_fill`."""
    _write(gguf.GGUFWriter(str(path), changes.pop("architecture", model.config.model_type)), model, kind, changes)
    return path


def write_parts(folder: Path, model: Any, kind: str = "F32") -> list[Path]:
    """Write the model in parts of a few tensors each, named as llama-gguf-split names them."""
    _write(gguf.GGUFWriter(str(folder / "model.gguf"), model.config.model_type, split_max_tensors=8), model, kind, {})
    return sorted(folder.glob("*.gguf"))


def _write(writer: gguf.GGUFWriter, model: Any, kind: str, changes: dict[str, Any]) -> None:
    _fill(writer, model, kind, changes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fill(writer: gguf.GGUFWriter, model: Any, kind: str, changes: dict[str, Any]) -> None:
    """Write metadata, tokenizer and tensors.

    changes: tokenizer (False: none), tokenizer_model, pre, template, ends (ids by name), layers, scaling, extra
    (further tensors), without (names of tensors to leave out).
    """
    config = model.config
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(changes.get("layers", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    if changes.get("tokenizer", True):
        _add_tokenizer(writer, changes)
    for name, weight in model.state_dict().items():
        spare = name.startswith("lm_head") and config.tie_word_embeddings
        if not spare and gguf_name(name) not in changes.get("without", ()):
            _add_tensor(writer, gguf_name(name), _as_llama_cpp(name, weight, config), kind)
    for name, values in changes.get("extra", {}).items():
        writer.add_tensor(name, values)


def _add_tokenizer(writer: gguf.GGUFWriter, changes: dict[str, Any]) -> None:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    writer.add_tokenizer_model(changes.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    # The package writes no empty list of merges. Without a list, transformers fails to derive merges from the tokens.
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    for name, token in changes.get("ends", {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if template := changes.get("template", TEMPLATE):
        writer.add_chat_template(template)


def gguf_name(name: str) -> str:
    """A weight's name in a GGUF file."""
    stem, suffix = name.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{suffix}"
    _, _, number, inner = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[inner]}.{suffix}"


def _as_llama_cpp(name: str, weight: Any, config: Any) -> Any:
    """llama.cpp rotates neighbouring values of a head where transformers rotates its halves, for Llama only."""
    values = weight.numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Any, kind: str) -> None:
    found = gguf.GGMLQuantizationType[kind]
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, quantized(values, found), raw_dtype=found)


def quantized(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """Blocks of a type. The package cannot write K-quants: random blocks with small scales stand in for them."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:  # gguf reads this type and cannot write it
        return _random_blocks(values.shape, kind)


def _random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> Any:
    size, count = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(sum(shape))
    blocks = random.integers(0, 256, (shape[0], shape[1] // size, count), np.uint8)
    # Every type has its float16 scales at the beginning or the end of a block.
    half = np.frombuffer(np.float16(3e-4).tobytes(), np.uint8)
    blocks[..., 0:2] = blocks[..., 2:4] = blocks[..., -2:] = blocks[..., -4:-2] = half
    return blocks.reshape(shape[0], -1)
