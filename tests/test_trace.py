"""Tracing: tiny random models of several architectures, traced and fused, answer as torch does under any cut."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import TraceError
from edgelm.export.passes import fusing_passes
from edgelm.export.tracing.attention import ATTENTION_NAME, trace_model
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model
from edgelm.runtime.sessions.in_place import OrtSession

from .conftest import byte_tokenizer

VOCABULARY = 257
CONTEXT = 160
TOKENS = 100
WINDOW = 24

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}

# Name of the configuration class, its settings, and the expected cache of each of the two layers.
Case = tuple[str, dict[str, Any], list[LayerCache]]
CASES: dict[str, Case] = {
    "llama": ("LlamaConfig", {**GROUPED, "num_key_value_heads": 1}, [LayerCache(1, 16, 16, None)] * 2),
    "qwen2, biases": ("Qwen2Config", GROUPED, [LayerCache(2, 16, 16, None)] * 2),
    "qwen3, normed queries and keys": (
        "Qwen3Config",
        {**GROUPED, "head_dim": 32},
        [LayerCache(2, 32, 32, None)] * 2,
    ),
    "mistral, sliding window": (
        "MistralConfig",
        {**GROUPED, "sliding_window": WINDOW},
        [LayerCache(2, 16, 16, WINDOW)] * 2,
    ),
    "gpt2, learned positions": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.3,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
        [LayerCache(4, 16, 16, None)] * 2,
    ),
    "phi3, packed projections": ("Phi3Config", GROUPED, [LayerCache(2, 16, 16, None)] * 2),
    "gemma2, soft caps and a window in every other layer": (
        "Gemma2Config",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
        [LayerCache(2, 16, 16, WINDOW), LayerCache(2, 16, 16, None)],
    ),
    "gpt_neox, rotates a part of the head": ("GPTNeoXConfig", COMMON, [LayerCache(4, 16, 16, None)] * 2),
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Threads slow each other down in models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(config: str, settings: dict[str, Any]) -> Any:
    """A random model whose biases and norm weights differ from their initial values, so that they matter."""
    import torch
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(("config", "settings", "layers"), CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_torch_in_any_cuts(
    tmp_path: Path, config: str, settings: dict[str, Any], layers: list[LayerCache]
) -> None:
    import torch

    model = build(config, settings)
    before = model.config._attn_implementation
    traced = trace_model(model)
    assert list(traced.layers) == layers
    assert model.config._attn_implementation == before

    random = np.random.default_rng(5)
    ids = random.integers(0, VOCABULARY, TOKENS).tolist()
    # The model itself must still work after tracing.
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
    ir.save(traced.graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    described = Model(VOCABULARY, CONTEXT, model.num_parameters(), traced.layers, CacheType("float32", None))
    session = OrtSession(tmp_path / "model.onnx", described, 1)
    for most in (1, 7, TOKENS):
        got = fed_in_cuts(session, ids, lambda most=most: int(random.integers(1, most + 1)))
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max(), f"fed in pieces of up to {most} tokens"


def fed_in_cuts(session: OrtSession, ids: list[int], cut: Callable[[], int]) -> np.ndarray:
    """The logits of a whole text from an empty cache, in pieces of the sizes that `cut` returns."""
    session.rewind(0)
    rows = []
    while session.length < len(ids):
        piece = ids[session.length : session.length + cut()]
        rows.append(session.step(piece, len(piece)).copy())
    return np.concatenate(rows)


def test_the_window_of_the_case_is_shorter_than_its_text() -> None:
    """Otherwise the sliding windows above would prove nothing."""
    assert WINDOW < TOKENS < CONTEXT


def test_a_traced_graph_has_the_inputs_and_outputs_of_a_bundle() -> None:
    traced = trace_model(build("LlamaConfig", {**GROUPED, "num_hidden_layers": 1})).graph.graph
    assert [value.name for value in traced.inputs] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in traced.outputs] == ["logits", "present.0.key", "present.0.value"]
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= set(traced.initializers)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("GPTJConfig", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_attention_outside_the_registry_is_refused_and_the_model_unchanged(
    config: str, settings: dict[str, Any]
) -> None:
    import torch

    model = build(config, settings)
    before = model.config._attn_implementation
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids).logits
    with pytest.raises(TraceError, match=type(model).__name__):
        trace_model(model)
    assert model.config._attn_implementation == before != ATTENTION_NAME
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.fixture
def branching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Llamas branch on values, which no graph can express."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)


@pytest.mark.usefixtures("branching")
def test_the_cause_of_the_exporters_error_is_reported(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "edgelm")
    model = build("LlamaConfig", {**GROUPED, "num_hidden_layers": 1})
    words = (
        r"LlamaForCausalLM cannot be traced: GuardOnDataDependentSymNode: Could not guard on data-dependent expression"
    )
    with pytest.raises(TraceError, match=f"^{words}.*$"):
        trace_model(model)
    assert capfd.readouterr().err == "", "torch printed its whole graph"
    assert "torch.ops.aten" in caplog.text


@pytest.mark.usefixtures("branching")
def test_a_model_that_fails_on_every_path_is_refused_with_each_reason_once(tmp_path: Path) -> None:
    build("LlamaConfig", {**GROUPED, "num_hidden_layers": 1}).save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    with pytest.raises(TraceError) as caught:
        export_model(ExportConfig(str(tmp_path / "model"), target="x86-cpu", out=tmp_path / "bundle"))
    (message,) = str(caught.value).splitlines()
    assert "fused attention / plain attention / plain attention, token by token: LlamaForCausalLM cannot" in message
    assert message.count("GuardOnDataDependentSymNode") == 1
    assert message.endswith("docs/models.md lists the types that can be; --debug shows all that was raised")
    shown = "".join(traceback.format_exception(caught.value))
    assert "torch.onnx" in shown, "the exporter's own error is chained"


def test_a_model_that_fails_in_the_trace_is_restored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = build("LlamaConfig", {**GROUPED, "num_hidden_layers": 1})
    before = model.config._attn_implementation

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the exporter gave up\nwith many words")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(TraceError, match=r"LlamaForCausalLM cannot be traced: RuntimeError: the exporter gave up$"):
        trace_model(model)
    assert model.config._attn_implementation == before
