"""Whole exports of current model families by the command line, from the folder to an answer: every stage runs for each
of them, those included that only a regular cache or a fused norm reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgelm.export.output.genai import GENAI_CONFIG_NAME
from edgelm.runtime import load
from edgelm.runtime.cli import main

from .conftest import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 64},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {},
    "Mistral": {"sliding_window": 64},
}
TARGET = """\
extends = "x86-cpu"
name = "any-loss"
[gate]
mean_kl = 20
p99_kl = 99
perplexity_increase_percent = 1e6
agreement_percent = 0
answers_percent = 0
cache_kl = 20
cache_kl_limit = 20
four_bits_kl = 20
"""


CASES = [*((family, "int8-rowwise") for family in FAMILIES), ("Llama", "int4-rowwise"), ("Qwen3", "int4-rowwise")]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_a_family_is_exported_whole(family: str, scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    target, bundle = tmp_path / "any-loss.toml", tmp_path / "bundle"
    target.write_text(TARGET, encoding="utf-8")
    words = ["export", str(tmp_path / "model"), "--target", str(target), "--scheme", scheme, "--out", str(bundle)]
    assert main(words) == 0
    heads = json.loads((bundle / GENAI_CONFIG_NAME).read_text(encoding="utf-8"))["model"]["decoder"]
    assert heads["num_attention_heads"] == config.num_attention_heads
    with load(bundle) as engine:
        answer = engine.generate("Once upon a time", max_tokens=8, min_tokens=8)
    assert answer.stats.generated_tokens == 8
