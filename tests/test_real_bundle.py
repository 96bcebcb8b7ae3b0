"""A bundle of a real model keeps the README's promises with the arithmetic chosen by its export, with kernels and
without: it answers, is exact under cuts, and supports batches, prefixes and draft tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelm.runtime import Engine, load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.evaluation.divergence import divergence, log_softmax
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import TEXT, require_kernels, shared

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WINDOW = 512


@pytest.fixture(params=["kernels", "onnxruntime"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether kernels or onnxruntime compute the products and attention."""
    if request.param == "kernels":
        require_kernels(monkeypatch)
    else:
        monkeypatch.setenv("EDGELM_KERNELS", "off")
    return str(request.param)


@pytest.fixture
def engine(real_bundle: Path, computed_by: str) -> Iterator[Engine]:
    with load(real_bundle, threads=2, response_cache=False, prefix_cache=False) as engine:
        yield engine


def test_the_model_knows_the_capital_of_france(engine: Engine) -> None:
    done = engine.generate(messages=QUESTION, max_tokens=32)
    assert done.text == "The capital of France is Paris."
    assert done.finish_reason == "stop"


def test_no_matrix_is_float32_and_both_widths_are_used(real_bundle: Path) -> None:
    manifest = Bundle.open(real_bundle).manifest
    assert manifest.exact_under_cuts
    assert set(manifest.quantization.activations.values()) == {8, 16}
    weights = sum(manifest.files[name].bytes for name in ("model.onnx", "model.onnx.data", "model.genai.onnx"))
    assert weights <= 1.03 * manifest.model.parameters


def test_any_cut_gives_the_same_bits(real_bundle: Path, computed_by: str) -> None:
    ids = Tokenizer(real_bundle / "tokenizer.json").encode(TEXT)[:300]
    session = open_session(Bundle.open(real_bundle), 2)
    whole = session.step(ids, len(ids)).copy()
    draw = np.random.default_rng(7)
    for _ in range(3):
        session.rewind(0)
        while session.length < len(ids):
            begin = session.length
            piece = ids[begin : begin + int(2 ** draw.uniform(0, 7))]
            np.testing.assert_array_equal(session.step(piece, len(piece)), whole[begin : begin + len(piece)])
    session.close()


def test_batches_answer_as_each_prompt_alone(engine: Engine) -> None:
    prompts = ["The river", "Once upon a time, there was a", "def add(a, b):"]
    alone = [engine.generate(prompt, max_tokens=12).text for prompt in prompts]
    assert [done.text for done in engine.generate_batch(prompts, max_tokens=12)] == alone


def test_a_prefix_survives_a_restart(real_bundle: Path, computed_by: str) -> None:
    answers = []
    for _ in range(2):
        with load(real_bundle, threads=2, response_cache=False, prefix_cache=True) as engine:
            answers.append(engine.generate(TEXT[:2000], max_tokens=8))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].stats.reused_tokens > 0.8 * answers[1].stats.prompt_tokens


def test_draft_tokens_change_no_answer(engine: Engine) -> None:
    prompt = "One two three four five six. One two three four five six. One two three"
    drafted = engine.generate(prompt, max_tokens=24, lookup=True)
    assert drafted.token_ids == engine.generate(prompt, max_tokens=24, lookup=False).token_ids


def test_the_model_is_close_to_fp32_on_held_out_text(real_bundle: Path, real_model: Path, computed_by: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    text = shared("text/wikitext-2/test.txt").read_text(encoding="utf-8")[:8000]
    ids = Tokenizer(real_bundle / "tokenizer.json").encode(text)[: 2 * WINDOW]
    exact = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    session = open_session(Bundle.open(real_bundle), 2)
    distances = []
    for begin in range(0, len(ids), WINDOW):
        window = ids[begin : begin + WINDOW]
        with torch.no_grad():
            expected = exact(torch.tensor([window])).logits[0].numpy()
        session.rewind(0)
        distances.append(divergence(log_softmax(expected), log_softmax(session.step(window, len(window)))))
    session.close()
    assert float(np.concatenate(distances).mean()) <= 0.004
