"""The plain path: models whose attention is not on transformers' registry, or that keep other states than keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import ExportError
from edgelm.export.passes import fusing_passes
from edgelm.export.trace_plain import trace_plain
from edgelm.runtime import load
from edgelm.runtime.cli import main
from edgelm.runtime.manifest import CacheType, Model
from edgelm.runtime.session import make_session

from .conftest import TEXT, byte_tokenizer

_COMMON: dict[str, Any] = {"vocab_size": 257, "initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 256}
_LAYERS: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GPT: dict[str, Any] = {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bloom": lambda: transformers.BloomConfig(**_COMMON, hidden_size=64, n_layer=2, n_head=4),
    "codegen": lambda: transformers.CodeGenConfig(**_GPT, rotary_dim=8),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_LAYERS, "num_key_value_heads": 4}, **_MLA, **_EXPERTS, first_k_dense_replace=1
    ),
    "falcon": lambda: transformers.FalconConfig(**_COMMON, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **_LAYERS,
        head_dim=16,
        global_head_dim=32,
        vocab_size_per_layer_input=257,
        hidden_size_per_layer_input=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        num_kv_shared_layers=0,
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_COMMON,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=512,
    ),
    "gptj": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=8),
    "lfm2": lambda: transformers.Lfm2Config(**_LAYERS, layer_types=["conv", "full_attention"]),
    "xglm": lambda: transformers.XGLMConfig(
        **_COMMON, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, init_std=0.3, max_position_embeddings=512
    ),
}
# Models that can go on from a state only token by token, or whose code cannot be traced for any number of tokens.
STEPWISE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mamba2": lambda: transformers.Mamba2Config(
        **_COMMON,
        hidden_size=64,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        num_hidden_layers=2,
        chunk_size=16,
    ),
    "mpt": lambda: transformers.MptConfig(**_COMMON, d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
}


def _model(config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", sorted([*CONFIGS, *STEPWISE]))
def test_logits_and_greedy_tokens_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    step_tokens = 1 if kind in STEPWISE else None
    model = _model({**CONFIGS, **STEPWISE}[kind]())
    traced = trace_plain(model, step_tokens)
    ir.passes.PassManager(fusing_passes(512))(traced.graph)
    ir.save(traced.graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    shape = Model(257, 512, 1, traced.layers, CacheType("float32", None), traced.layout, traced.states, step_tokens)
    session = make_session(tmp_path / "model.onnx", shape, 1)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 256, 40)]
    with torch.no_grad():
        reference = model(torch.tensor([ids])).logits[0].numpy()
    cuts = (0, 7, 8, 9, 22, 40)
    pieces = [ids[begin:end] for begin, end in itertools.pairwise(cuts)]
    logits = np.concatenate([session.step(piece, len(piece)).copy() for piece in pieces])
    assert np.abs(logits - reference).max() < 1e-4 * np.abs(reference).max()

    everything = torch.ones(1, len(ids), dtype=torch.int64)  # id 0 is a token here, no padding
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(torch.tensor([ids]), attention_mask=everything, **settings)
    expected = output[0, len(ids) :].tolist()
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < len(expected):
        tokens.append(int(session.step(tokens[-1:])[0].argmax()))
    assert tokens == expected


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a tiny model of a type with the default settings, once; returns the bundle."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            _model({**CONFIGS, **STEPWISE}[kind]()).save_pretrained(folder / "model")
            byte_tokenizer(folder / "model")
            done[kind] = export_model(ExportConfig(str(folder / "model"), target="x86-cpu", out=folder / "bundle")).path
        return done[kind]

    return run


@pytest.mark.parametrize("kind", ["bloom", "lfm2", "mamba2"])
def test_the_path_is_found_by_trial_and_the_bundle_answers(export: Callable[[str], Path], kind: str) -> None:
    with load(export(kind), response_cache=False) as engine:
        model = engine.bundle.manifest.model
        assert (model.context_length == 512) == (kind == "lfm2"), "without positions there is no end to a context"
        assert model.cache_layout == "concatenated" and model.kv.type == "float32"
        assert (model.step_tokens == 1) == (kind in STEPWISE)
        assert bool(model.states) == (kind in ("lfm2", "mamba2"))
        assert engine.bundle.manifest.quantization.scheme == "int8-rowwise"
        first = engine.generate(TEXT[:60], max_tokens=12)
        longer = engine.generate(TEXT[:80], max_tokens=12)
        # Keys and values can be cut back to what two prompts share; a convolution or a recurrence begins anew.
        assert (longer.stats.reused_tokens > 0) == (not model.states)
    with load(export(kind), response_cache=False) as fresh:
        assert fresh.generate(TEXT[:80], max_tokens=12).token_ids == longer.token_ids
        assert fresh.generate(TEXT[:60], max_tokens=12).token_ids == first.token_ids


def test_commands_work_on_a_bundle_with_states(
    export: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(export("lfm2"))
    assert main(["inspect", bundle]) == main(["verify", bundle]) == main(["bench", bundle, "--context", "32"]) == 0
    assert "no attention" in capsys.readouterr().out


def test_an_int8_cache_is_refused_where_attention_is_not_fused(tmp_path: Path) -> None:
    _model(CONFIGS["bloom"]()).save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    with pytest.raises(ExportError, match="cannot be int8: leave --kv out"):
        export_model(ExportConfig(str(tmp_path / "model"), kv="int8", target="x86-cpu", out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
