"""The INT8 cache's gate: values outside the calibrated range are found. They get wider scales or fail the export, which
names the layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.gate.cache_prompts import CachePrompts, UnusualTokens, cache_prompts
from edgelm.runtime import load
from edgelm.runtime.cli import main
from edgelm.runtime.errors import VerificationError
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import TEXT, WIDE_TARGET, byte_tokenizer, tiny_llama

IDS = list(range(32, 120)) * 30
VOCABULARY = 257
END = 256
# A channel of layer 0's keys, in its first KV head.
CHANNEL = 5


def prompts_of(unusual: UnusualTokens) -> CachePrompts:
    return cache_prompts(IDS, unusual, VOCABULARY, 512)


def never_shown(model: Path) -> int:
    """A token that occurs in no prompt that calibrates the model in a folder."""
    text = Tokenizer(model / "tokenizer.json").encode(TEXT)
    prompts = cache_prompts(text, UnusualTokens((END,), (), ()), VOCABULARY, 512)
    return min(set(range(VOCABULARY)) - {token for prompt in prompts.calibrating for token in prompt})


def planted(folder: Path, size: float) -> Path:
    """A model with an outlier: of all embeddings only one token's has a component in a certain direction, and one key
    channel alone reads that direction."""
    import torch

    folder.mkdir()
    byte_tokenizer(folder)
    model = tiny_llama(tie_word_embeddings=False)
    token = never_shown(folder)
    with torch.no_grad():
        embedding, keys = model.model.embed_tokens.weight, model.model.layers[0].self_attn.k_proj.weight
        embedding[:, 7] = 0
        embedding[token] = 0
        embedding[token, 7] = 1
        keys[:, 7] = 0
        keys[CHANNEL, 7] = size
    model.save_pretrained(folder)
    return folder


def export(model: Path, out: Path, **settings: Any) -> Path:
    return export_model(ExportConfig(str(model), target=WIDE_TARGET, out=out, **settings)).path


def report_of(bundle: Path) -> Any:
    return json.loads((bundle / "report.json").read_text(encoding="utf-8"))["cache"]


def test_calibrating_and_judging_prompts_are_disjoint() -> None:
    strange = tuple(range(VOCABULARY))
    prompts = prompts_of(UnusualTokens((END, 3), strange, (65, 66, 67)))
    calibrating = [*map(tuple, prompts.calibrating)]
    judging = [(kind, tuple(prompt)) for kind, prompt in prompts.judging]
    assert not set(calibrating) & {prompt for _, prompt in judging}
    kinds = dict.fromkeys(kind for kind, _ in judging)
    assert list(kinds) == ["text", "random tokens", "special tokens", "rare tokens"]
    assert any(prompt[0] == END for prompt in calibrating), "a text that begins with the begin-of-text token"
    assert (65, 66, 67) in calibrating
    shown = {token for prompt in calibrating for token in prompt}
    rare = [token for kind, prompt in judging if kind == "rare tokens" for token in prompt]
    assert rare
    assert not shown & set(rare)
    assert len(rare) == len(set(rare))
    assert {END, 3} <= {token for kind, prompt in judging if kind == "special tokens" for token in prompt}
    text = [token for kind, prompt in judging if kind == "text" for token in prompt]
    held_out = IDS[-(len(IDS) // 4) :]
    assert len(text) == 512 < len(held_out)
    assert text == held_out[:512], "the first window of held-out text"
    assert max(map(len, prompts.calibrating)) == 512, "later positions have other ranges of keys and values"


@pytest.mark.parametrize("context", [1, 2, 16])
def test_no_prompt_is_longer_than_the_context(context: int) -> None:
    prompts = cache_prompts(IDS[:64], UnusualTokens((END,), tuple(range(VOCABULARY)), (1, 2, 3)), VOCABULARY, context)
    assert all(1 <= len(prompt) <= context for prompt in prompts.calibrating)
    assert all(1 <= len(prompt) <= context for _, prompt in prompts.judging)


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its bundle; the planted token's key is 6 times as large as any on the calibrating prompts."""
    folder = tmp_path_factory.mktemp("planted")
    model = planted(folder / "model", 6.0)
    return model, export(model, folder / "bundle")


def test_a_far_value_is_found_and_its_channel_widened(widened: tuple[Path, Path]) -> None:
    _, bundle = widened
    found = report_of(bundle)
    worst = found["layers"][0]
    assert worst["layer"] == 0
    assert 4 < worst["largest_excess"] == found["largest_excess"] < 6
    assert found["widened_channels"] > 0
    assert found["clipped_percent"] > 0
    before = {item["kind"]: item["kl"] for item in found["kinds_before_widening"]}
    after = {item["kind"]: item["kl"] for item in found["kinds"]}
    assert after["rare tokens"] < before["rare tokens"] / 10
    scales = ir.load(bundle / "model.onnx").graph.initializers["cache.0.key.scale"].const_value
    assert scales is not None
    assert int(np.argmax(scales.numpy())) in (CHANNEL, (CHANNEL + 8) % 16), "the channel, or its rotary partner"


def test_answers_with_the_planted_token_equal_a_float32_caches(widened: tuple[Path, Path], tmp_path: Path) -> None:
    model, bundle = widened
    prompt = [*IDS[:20], never_shown(model), *IDS[40:50]]
    sessions = []
    for path in (bundle, export(model, tmp_path / "float32", kv="float32")):
        with load(path, response_cache=False, prefix_cache=False) as engine:
            done = engine.generate(token_ids=prompt, max_tokens=1, logprobs=5)
            assert done.logprobs is not None
            sessions.append(dict(done.logprobs[0].top))
    left, right = sessions
    assert max(left, key=left.__getitem__) == max(right, key=right.__getitem__)
    for item in left.keys() & right.keys():
        assert abs(left[item] - right[item]) < 0.3


def test_a_model_that_wide_scales_spoil_is_refused_by_layer(tmp_path: Path) -> None:
    """The channel 50 times as large: a scale that holds it leaves two bits for all other tokens."""
    with pytest.raises(VerificationError, match=r"INT8 cache does not suit .*layer 0 \(.* times\).*--kv float32"):
        export(planted(tmp_path / "model", 50.0), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    bundle = export(tmp_path / "model", tmp_path / "bundle", kv="float32")
    assert report_of(bundle) is None


def test_the_report_shows_what_the_gate_found(widened: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = widened
    assert main(["inspect", str(bundle), "--report"]) == 0
    shown = capsys.readouterr().out
    assert "Cache values beyond range" in shown
    assert "channels widened" in shown
    assert "Answers, INT8 cache" in shown


def test_a_common_model_loses_nothing(tiny_bundle: Path) -> None:
    found = report_of(tiny_bundle)
    assert found["clipped_percent"] < 1
    assert all(item["kl"] < 1e-2 for item in found["kinds"])
    assert {item["kind"] for item in found["kinds"]} >= {"text", "random tokens", "special tokens"}
