"""Text that a teacher writes itself, and how a distillation uses it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from edgelm.export import ExportConfig, compress_model
from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.training.own_text import _drawn, chat_opening, write_own_text
from edgelm.export.errors import RecipeError

from .conftest import TEXT, byte_tokenizer, tiny_llama
from .test_compress import write_recipe

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"


def tokenizer_of(folder: Path, template: str | None) -> Any:
    byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def test_half_of_the_text_is_chats(tmp_path: Path) -> None:
    """10 passages begin as the template begins a chat, 10 with a token of the text; of many, at most 64 at a time."""
    module, tokenizer = tiny_llama(), tokenizer_of(tmp_path, TEMPLATE)
    opening = chat_opening(tokenizer)
    assert opening == tokenizer("[user] ")["input_ids"]
    rows = torch.tensor(write_own_text(module, tokenizer, [65, 66], 20 * 20, 20)).reshape(20, 20)
    assert rows[:10, : len(opening)].tolist() == [opening] * 10
    assert set(rows[10:, 0].tolist()) == {65, 66}
    assert write_own_text(module, tokenizer, [65, 66], 20 * 20, 20) == rows.flatten().tolist(), "reproducible"
    # 130 passages of 16 tokens: two turns of 33 chats and 33 others.
    many = torch.tensor(write_own_text(module, tokenizer, [65, 66], 130 * 16, 16)).reshape(4, 33, 16)
    chats = (many[:, :, : len(opening)] == torch.tensor(opening)).all(-1).all(-1)
    assert chats.tolist() == [True, False, True, False]


def test_tokens_are_sampled_from_the_models_predictions(tmp_path: Path) -> None:
    """Tokens are sampled from the model's predictions: their mean surprise is the entropy of the predictions."""
    module = tiny_llama(initializer_range=0.1)
    rows = torch.tensor(write_own_text(module, tokenizer_of(tmp_path, None), [65], 128 * 24, 24)).reshape(-1, 24)
    with torch.no_grad():
        said = torch.log_softmax(module(rows).logits[:, :-1], -1)
    surprise = -said.gather(2, rows[:, 1:, None]).mean()
    entropy = -(said.exp() * said).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


def test_tokens_without_probability_are_never_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.full((2000, 5), -torch.inf)
    logits[:, 1], logits[:, 3] = 0.0, 1.0
    drawn = _drawn(logits)
    assert drawn.shape == (2000, 1)
    assert set(drawn.flatten().tolist()) == {1, 3}
    assert float((drawn == 3).double().mean()) == pytest.approx(math.e / (1 + math.e), abs=0.04)


def test_a_teacher_whose_predictions_are_not_finite_is_refused() -> None:
    with pytest.raises(RecipeError, match="the teacher cannot generate text"):
        _drawn(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))


def test_a_tokenizer_without_a_template_has_no_chats(tmp_path: Path) -> None:
    assert chat_opening(tokenizer_of(tmp_path, None)) is None


def test_a_distillation_trains_on_what_its_teacher_writes(tmp_path: Path, monkeypatch: Any) -> None:
    """An interrupted run reuses the text, unless it is of another recipe."""
    from edgelm.export.compress.training import own_text
    from edgelm.export.compress.training import train as training

    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "m")
    byte_tokenizer(tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    step = {"use": "distil", "steps": 2, "batch": 2, "length": 32, "own_text": 1000}
    recipe = write_recipe(tmp_path / "r.toml", {"use": "drop-layers", "last": 1}, step)
    seen: list[torch.Tensor] = []
    run = training.Loop.run
    monkeypatch.setattr(training.Loop, "run", lambda self, ids, length: (seen.append(ids), run(self, ids, length))[1])
    config = ExportConfig(str(tmp_path / "m"), out=tmp_path / "out", compress=recipe, text=tmp_path / "text.txt")
    kept = tmp_path / "out.checkpoints" / "2-distil" / "own_text.json"
    found: list[dict[str, Any]] = []
    keep = own_text.keep_own_text
    monkeypatch.setattr(own_text, "keep_own_text", lambda *a: (keep(*a), found.append(json.loads(kept.read_text())))[0])
    compress_model(config)
    for origin, token_ids in ((found[0]["origin"], [7] * 1023), ("of another recipe", [9] * 1023)):
        shutil.rmtree(tmp_path / "out")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"origin": origin, "token_ids": token_ids}), encoding="utf-8")
        compress_model(config)
    written, reused, renewed = (rows[-1023:].tolist() for rows in seen)
    assert reused == [7] * 1023
    assert written == renewed != reused
    assert seen[0][:-1023].tolist() == seen[1][:-1023].tolist() and len(seen[0]) == len(seen[1])


def test_a_negative_own_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="own_text must be 0 or more"):
        parse_recipe({"step": [{"use": "distil", "own_text": -1}]}, "test", "test.toml")
