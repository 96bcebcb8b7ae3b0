"""Every model type of the zoo answers as torch does, fused and quantized, or is refused for the reason in the table.

Prompts are longer than the sliding windows of the models that have one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.calibrate import cache_ranges
from edgelm.export.errors import TraceError
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.trace import TracedModel, trace_model
from edgelm.export.verify import compare_quantized, compare_with_source
from edgelm.runtime.decode import Sequencer
from edgelm.runtime.errors import VerificationError
from edgelm.runtime.manifest import CacheType, Model
from edgelm.runtime.session import OrtSession
from edgelm.targets import Gate
from tests.conftest import ROOT
from tests.model_zoo import CONTEXT, REFUSED, SAME, VOCABULARY, WINDOW, causal_types, tiny_model

STEPS = 32
_RANDOM = np.random.default_rng(5)
PROMPTS = [_RANDOM.integers(0, 256, length).tolist() for length in (40, 5)]
FLOAT = CacheType("float32", None)
INT8 = CacheType("int8", "channel")
# Loose: 2 random layers spread their logits less evenly than trained ones, and 72 tokens make one position 1.4 %.
GATE = Gate(logit_difference=1e-4, perplexity_increase_percent=20.0, agreement_percent=80.0, decided_margin=0.3)


def fused(model: Any) -> TracedModel:
    traced = trace_model(model)
    ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
    return traced


def session_of(traced: TracedModel, path: Path, kv: CacheType) -> OrtSession:
    ir.save(traced.graph, path, external_data=f"{path.name}.data")
    return OrtSession(path, Model(VOCABULARY, CONTEXT, 1, traced.layers, kv), 1)


def generated(model: Any, prompt: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=STEPS, max_new_tokens=STEPS
    )
    return [int(token) for token in output[0, len(prompt) :]]


def logits(model: Any, token_ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("model_type", SAME)
def test_tokens_are_those_of_generate_and_int8_stays_near(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    traced = fused(model)
    before = session_of(traced, tmp_path / "model.onnx", FLOAT)
    reference = logits(model, PROMPTS[0])
    difference = np.abs(before.step(PROMPTS[0], len(PROMPTS[0])) - reference).max()
    assert difference <= GATE.logit_difference * np.abs(reference).max()
    assert [list(Sequencer(before).greedy(prompt, STEPS, ())) for prompt in PROMPTS] == expected

    text = PROMPTS[0] + expected[0]
    ranges = cache_ranges(before, text, len(text))
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, ranges))(traced.graph)
    after = session_of(traced, tmp_path / "quantized.onnx", INT8)
    compare_quantized(before, after, text, len(text), GATE)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_type_is_refused_for_the_reason_in_the_table(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    try:
        compare_with_source(model, session_of(fused(model), tmp_path / "model.onnx", FLOAT), PROMPTS[0], GATE)
    except (TraceError, VerificationError) as error:
        assert REFUSED[model_type].error in str(error)
    else:
        pytest.fail(f"{model_type} works now: move it from REFUSED to SAME, and run scripts/list_models.py")


def test_the_prompt_is_longer_than_the_window() -> None:
    assert WINDOW < len(PROMPTS[0]) < CONTEXT


def test_the_zoo_names_types_of_transformers_once() -> None:
    assert not set(SAME) & set(REFUSED)
    assert len(set(SAME)) == len(SAME)
    assert set(SAME) | set(REFUSED) <= set(causal_types())


def test_the_document_is_what_the_script_writes() -> None:
    written = subprocess.run(
        [sys.executable, "scripts/list_models.py", "--print"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == written.stdout


def test_a_type_that_nobody_listed_is_traced(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = unlisted_model()
    ids = PROMPTS[0]
    expected = logits(model, ids)
    session = session_of(fused(model), tmp_path / "model.onnx", FLOAT)
    first = session.step(ids[:30], 30).copy()
    second = session.step(ids[30:], 10)
    assert abs(first - expected[:30]).max() <= 1e-4 * abs(expected).max()
    assert abs(second - expected[30:]).max() <= 1e-4 * abs(expected).max()


def unlisted_model() -> Any:
    """Two attention layers of three heads and learned positions, written on transformers' public interfaces alone."""
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class UnlistedConfig(PreTrainedConfig):
        model_type = "unlisted"

    class UnlistedAttention(torch.nn.Module):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            self.config, self.layer_idx, self.is_causal = config, layer_idx, True
            self.projection, self.out = torch.nn.Linear(48, 144), torch.nn.Linear(48, 48)

        def forward(self, hidden: Any, cache: Any) -> Any:
            shape = (*hidden.shape[:2], 3, 16)
            query, key, value = (part.view(shape).transpose(1, 2) for part in self.projection(hidden).chunk(3, dim=-1))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            result, _ = attend(self, query, key, value, None, scaling=0.3, dropout=0.0)
            return hidden + self.out(result.reshape(hidden.shape).contiguous())

    class UnlistedModel(PreTrainedModel):
        config_class = UnlistedConfig
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tokens, self.places = torch.nn.Embedding(VOCABULARY, 48), torch.nn.Embedding(CONTEXT, 48)
            self.blocks = torch.nn.ModuleList(UnlistedAttention(config, index) for index in range(2))
            self.head = torch.nn.Linear(48, VOCABULARY)
            self.post_init()

        def forward(
            self, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, use_cache: bool = False
        ) -> Any:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])[None]
            hidden = self.tokens(input_ids) + self.places(position_ids)
            for block in self.blocks:
                hidden = block(hidden, past_key_values)
            return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)

    return UnlistedModel(UnlistedConfig(num_hidden_layers=2, vocab_size=VOCABULARY, attn_implementation="sdpa")).eval()
