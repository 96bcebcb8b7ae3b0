"""scripts/off_grid_model.py: the same answers from weights that lie elsewhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from .conftest import ROOT, byte_tokenizer, tiny_llama


@pytest.fixture
def off_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("off_grid_model")
    for name in ("off_grid_model", "real_model"):
        sys.modules.pop(name, None)


def test_answers_stay_and_blocks_of_weights_change(off_grid: ModuleType, tmp_path: Path) -> None:
    source = tiny_llama()
    with torch.no_grad():
        for layer in source.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 2)
    source.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    off_grid.make(tmp_path / "model", tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(source(ids).logits, made(ids).logits, atol=1e-4)
    for name, weight in source.named_parameters():
        if name.endswith(("v_proj.weight", "o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            assert not torch.equal(weight, made.get_parameter(name)), name


def test_a_model_that_computes_otherwise_is_refused(off_grid: ModuleType, tmp_path: Path) -> None:
    source = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.v_proj.bias.uniform_(-1, 1)
    source.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    with pytest.raises(SystemExit, match="it is no plain Llama"):
        off_grid.make(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
