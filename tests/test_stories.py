"""A real pretrained model, stories260k: its bundles against transformers, on real stories."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.evaluation.scoring import perplexity
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import shared

STEPS = 200
PROMPTS = 20
SCORED_TEXTS = 100
MOST_INCREASE_PERCENT = 0.3
LILY = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """TinyStories texts."""
    texts: list[str] = json.loads(shared("text/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
    return texts


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Threads slow each other down in a model this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("models/stories260k")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def generated(model: Any, ids: list[int], ends: list[int]) -> tuple[list[int], str]:
    """The tokens of transformers' greedy generate, without an end token, and why it ended."""
    import torch

    settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    output = model.generate(torch.tensor([ids]), **settings)
    tokens = [int(token) for token in output[0, len(ids) :]]
    return (tokens[:-1], "stop") if tokens[-1] in ends else (tokens, "length")


def test_fp32_gives_exactly_the_tokens_of_transformers(
    stories_bundle: Callable[[str], Path], stories: list[str], reference: tuple[Any, Any]
) -> None:
    model, tokenizer = reference
    # Prompts of different lengths, most of them cut within a word.
    prompts = [text[: 10 + 7 * index] for index, text in enumerate(stories[:PROMPTS])]
    assert len(set(prompts)) == PROMPTS
    with load(stories_bundle("fp32")) as engine:
        assert engine.bundle.manifest.tokens.eos == (model.generation_config.eos_token_id,)
        for prompt in prompts:
            ids = engine.encode(prompt)
            assert ids == tokenizer(prompt)["input_ids"]
            done = engine.generate(token_ids=ids, max_tokens=STEPS)
            expected = generated(model, ids, [model.generation_config.eos_token_id])
            assert (list(done.token_ids), done.finish_reason) == expected, prompt


def test_fp32_stops_where_transformers_stops(
    stories_bundle: Callable[[str], Path], stories: list[str], reference: tuple[Any, Any], tmp_path: Path
) -> None:
    """The model ends a story with its begin-of-text token, which its configuration does not list as an end token. A
    copy of the bundle does."""
    model, _ = reference
    folder = shutil.copytree(stories_bundle("fp32"), tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["tokens"]["eos"] = [1, 2]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with load(folder) as engine:
        for text in sorted(stories, key=len)[:4]:
            ids = engine.encode(text.rsplit(" ", 4)[0])  # near the end of a story
            done = engine.generate(token_ids=ids, max_tokens=STEPS)
            expected = generated(model, ids, [1, 2])
            assert (list(done.token_ids), done.finish_reason) == expected
            assert done.finish_reason == "stop"


@pytest.mark.parametrize("scheme", ["fp32", "int8-rowwise"])
def test_the_greedy_story_is_the_known_one(stories_bundle: Callable[[str], Path], scheme: str) -> None:
    with load(stories_bundle(scheme)) as engine:
        assert engine.generate("Once upon a time", max_tokens=60).text.startswith(LILY)


def corpus_perplexity(bundle: Path, texts: list[str]) -> float:
    """Perplexity over all texts, each scored from its own beginning and weighted by its tokens."""
    tokenizer = Tokenizer(bundle / "tokenizer.json")
    session = open_session(Bundle.open(bundle))
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == Bundle.open(bundle).manifest.tokens.bos
        found = perplexity(session, ids)
        assert found.tokens == len(ids) - 1
        total, count = total + math.log(found.value) * found.tokens, count + found.tokens
    session.close()
    return math.exp(total / count)


def test_int8_keeps_the_perplexity(stories_bundle: Callable[[str], Path], stories: list[str]) -> None:
    texts = stories[:SCORED_TEXTS]
    before, after = (corpus_perplexity(stories_bundle(scheme), texts) for scheme in ("fp32", "int8-rowwise"))
    increase = 100 * (after / before - 1)
    # The text suits this model. If fp32 were far off, the comparison below would be between two broken models.
    assert 3 < before < 7, f"fp32 has perplexity {before:.4f}"
    assert increase <= MOST_INCREASE_PERCENT, f"perplexity rises from {before:.4f} to {after:.4f}, {increase:.3f} %"
    assert after != before, "both bundles compute the same, so nothing was quantized"


def test_long_texts_lose_no_more_than_short_ones(stories_bundle: Callable[[str], Path]) -> None:
    """This model's keys and values grow with the position; the INT8 cache's scales must hold them."""
    report = json.loads((stories_bundle("int8-rowwise") / "report.json").read_text(encoding="utf-8"))["against_fp32"]
    *early, late = [entry for entry in report["positions"] if entry["begin"] >= 16]
    assert (late["begin"], late["end"]) == (256, 512)
    assert late["mean_kl"] < 2 * max(entry["mean_kl"] for entry in early)


def test_code_and_french_do_not_judge_a_model_of_english_stories(stories_bundle: Callable[[str], Path]) -> None:
    report = json.loads((stories_bundle("int8-rowwise") / "report.json").read_text(encoding="utf-8"))["against_fp32"]
    assert report["unknown_kinds"] == ["code", "french"]
    assert {kind["kind"] for kind in report["kinds"]} == {"code", "dialogue", "french", "prose"}
    assert report["tokens"] == sum(kind["tokens"] for kind in report["kinds"] if kind["kind"] in ("dialogue", "prose"))


def test_int8_is_a_third_of_the_size(stories_bundle: Callable[[str], Path]) -> None:
    fp32, int8 = ((stories_bundle(scheme) / "model.onnx.data").stat().st_size for scheme in ("fp32", "int8-rowwise"))
    assert int8 < fp32 / 3, f"{int8} bytes against {fp32}"
