"""Every model type of the zoo, traced in the first way that works, gives torch's answers; its INT8 logits are close to
torch's.

Prompts are longer than the sliding windows of models that have one.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import TraceError
from edgelm.export.gate.quality import faults
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.quantization.calibration import cache_ranges
from edgelm.export.tracing.attention import TracedModel
from edgelm.export.tracing.ways import PATHS, TracePath
from edgelm.runtime import load
from edgelm.runtime.bundle.manifest import CacheType, Model
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import SessionError
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.loading import make_session
from edgelm.runtime.sessions.protocol import Session
from edgelm.targets import Gate
from tests.conftest import ROOT, WIDE_TARGET, byte_tokenizer, compare_texts
from tests.model_zoo import CONTEXT, NOT_TRIED, REFUSED, SAME, SAME_TOO, VOCABULARY, WINDOW, causal_types, tiny_model

STEPS = 32
_RANDOM = np.random.default_rng(5)
PROMPTS = [_RANDOM.integers(0, 256, length).tolist() for length in (40, 5)]
FLOAT = CacheType("float32", None)
INT8 = CacheType("int8", "channel")
# Loose limits: 2 random layers spread their logits less evenly than trained ones, and few of the 71 positions are
# decided. Where experts are chosen by a small margin, INT8 chooses others.
GATE = Gate(
    mean_kl=0.4,
    p99_kl=4.0,
    perplexity_increase_percent=20.0,
    agreement_percent=75.0,
    answers_percent=75.0,
    logit_difference=1e-4,
    decided_margin=0.3,
    activations_kl=0.0,
    cache_kl=0.001,
    cache_kl_limit=0.01,
    four_bits_kl=0.35,
)


@dataclass(frozen=True)
class Attempt:
    """A model traced one way, as a session on its fused fp32 graph."""

    path: str
    traced: TracedModel
    session: Session


def session_of(traced: TracedModel, path: Path, kv: CacheType) -> Session:
    ir.save(traced.graph, path, external_data=f"{path.name}.data")
    shape = Model(VOCABULARY, CONTEXT, 1, traced.layers, kv, traced.layout, traced.states, traced.step_tokens)
    return make_session(path, shape, 1)


def generated(model: Any, prompt: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    # No end token, because generate would suppress it. No padding token, because id 0 is an ordinary token here.
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return [int(token) for token in output[0, len(prompt) :]]


def first_right(model: Any, folder: Path) -> Attempt | list[str]:
    """The first way that gives the tokens of generate, or the reasons why none does."""
    expected = [generated(model, prompt) for prompt in PROMPTS]
    refusals = []
    for path in PATHS:
        found = attempt(model, path, folder / "model.onnx", expected)
        if isinstance(found, Attempt):
            return found
        refusals.append(found)
    return refusals


def attempt(model: Any, path: TracePath, file: Path, expected: list[list[int]]) -> Attempt | str:
    name, trace = path
    try:
        traced = trace(model)
        ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
        session = session_of(traced, file, FLOAT)
        difference = cut_difference(model, session, PROMPTS[0])
        # In pieces, so that most steps of a prompt compute no logits.
        tokens = [list(Sequencer(session, 9).greedy(prompt, STEPS, ())) for prompt in PROMPTS]
    except (TraceError, SessionError) as error:
        return f"{name}: {error}"
    if tokens != expected:
        return f"{name}: other tokens than torch's"
    if difference > GATE.logit_difference:
        return f"{name}: logits are off by {difference:.3g} of the largest"
    return Attempt(name, traced, session)


def cut_difference(model: Any, session: Session, prompt: list[int]) -> float:
    """Largest difference between a cut prompt's logits and torch's, relative to their largest magnitude."""
    import torch

    with torch.no_grad():
        reference = model(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    pieces = [prompt[begin:end] for begin, end in itertools.pairwise((0, 7, 8, 9, 22, len(prompt)))]
    logits = np.concatenate([session.step(piece, len(piece)).copy() for piece in pieces])
    return float(np.abs(logits - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("model_type", [*SAME, *(pytest.param(name, marks=pytest.mark.slow) for name in SAME_TOO)])
def test_tokens_are_those_of_generate_and_int8_stays_near(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    right = first_right(model, tmp_path)
    assert isinstance(right, Attempt), right
    assert right.path == {**SAME, **SAME_TOO}[model_type]

    text = PROMPTS[0] + generated(model, PROMPTS[0])
    ranges, kv = {}, FLOAT
    if isinstance(right.session, OrtSession):
        ranges, kv = cache_ranges(right.session, [text]), INT8
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, ranges))(right.traced.graph)
    quantized = session_of(right.traced, tmp_path / "quantized.onnx", kv)
    assert not faults(compare_texts(right.session, quantized, text, len(text), GATE), GATE)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_in_the_refused_table_is_refused(tmp_path: Path, model_type: str) -> None:
    assert isinstance(first_right(tiny_model(model_type), tmp_path), list), (
        f"{model_type} works now: move it from REFUSED to SAME, and run scripts/list_models.py"
    )


def test_the_prompt_is_longer_than_the_window() -> None:
    assert WINDOW < len(PROMPTS[0]) < CONTEXT


def test_the_zoo_names_each_type_of_transformers_once() -> None:
    named = [*SAME, *SAME_TOO, *REFUSED, *NOT_TRIED]
    assert len(set(named)) == len(named)
    assert sorted(named) == causal_types(), "list the new types of this transformers in tests/model_zoo.py"


def test_the_document_is_what_the_script_writes() -> None:
    written = subprocess.run(
        [sys.executable, "scripts/list_models.py", "--print"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == written.stdout


def test_an_unlisted_type_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    model = unlisted_model(monkeypatch)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    expected = generated(model, PROMPTS[0])
    config = ExportConfig(str(tmp_path / "model"), target="x86-cpu", scheme="fp32", out=tmp_path / "bundle")
    done = export_model(config)
    assert done.manifest.source.architecture == "UnlistedModel" and done.manifest.model.cache_layout == "in_place"
    with load(done.path, threads=1) as engine:
        assert list(engine.generate(token_ids=PROMPTS[0], max_tokens=STEPS).token_ids) == until_end(expected)
    export_model(ExportConfig(str(tmp_path / "model"), target=WIDE_TARGET, out=tmp_path / "int8"))


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(256)] if 256 in tokens else tokens


def unlisted_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two attention layers of three heads and learned positions, built only on transformers' public interfaces and
    registered with it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

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

    class UnlistedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = UnlistedConfig
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tokens, self.places = torch.nn.Embedding(VOCABULARY, 48), torch.nn.Embedding(CONTEXT, 48)
            self.blocks = torch.nn.ModuleList(UnlistedAttention(config, index) for index in range(2))
            self.head = torch.nn.Linear(48, VOCABULARY)
            self.post_init()

        def forward(
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: bool = False,
            **_: Any,
        ) -> Any:
            if position_ids is None:
                past = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = torch.arange(past, past + input_ids.shape[1])[None]
            hidden = self.tokens(input_ids) + self.places(position_ids)
            for block in self.blocks:
                hidden = block(hidden, past_key_values)
            return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)

    # Registered for this test alone.
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})
    AutoConfig.register("unlisted", UnlistedConfig)
    AutoModelForCausalLM.register(UnlistedConfig, UnlistedModel)
    return UnlistedModel(
        UnlistedConfig(num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, eos_token_id=256)
    ).eval()
