"""Rotary embeddings that depend on the length of the whole text: the context ends where they would change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.cli import main
from edgelm.runtime.errors import ContextLengthError

from .conftest import WIDE_TARGET, byte_tokenizer, tiny_llama
from .model_zoo import SAME, tiny_model

ORIGINAL, MOST = 64, 320
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def phi(long_factor: float) -> Any:
    """A tiny model like Phi 3.5, with other factors for texts longer than the original context."""
    import torch
    import transformers

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [long_factor] * 8}
    config = transformers.Phi3Config(
        vocab_size=257,
        num_key_value_heads=2,
        max_position_embeddings=MOST,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={**rope, "original_max_position_embeddings": ORIGINAL, "factor": MOST / ORIGINAL},
        initializer_range=0.3,
        **SIZES,
        **ENDS,
    )
    torch.manual_seed(3)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope") / "phi"
    phi(2.0).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("settings", [["--scheme", "fp32"], ["--target", WIDE_TARGET]])
def test_the_context_ends_where_the_rotation_changes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    import torch
    import transformers

    assert main(["export", str(folder), "--out", str(tmp_path / "bundle"), *settings]) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.model.context_length == ORIGINAL
    (note,) = manifest.notes
    assert note.startswith("the context ends at 64 of the model's 320 tokens")
    assert "rope_type 'longrope'" in note
    assert note in capsys.readouterr().out

    prompt = list(b"It was a bright cold day in April, and the clocks")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.generate(torch.tensor([prompt]), max_length=ORIGINAL, do_sample=False, eos_token_id=-1)
    with load(tmp_path / "bundle", response_cache=False, prefix_cache=False) as engine:
        done = engine.generate(token_ids=prompt, max_tokens=100)
        assert done.finish_reason == "context_full"
        if "fp32" in settings:
            # The last token is chosen with a full context and needs no position.
            assert list(done.token_ids)[:-1] == expected[0, len(prompt) :].tolist()
        with pytest.raises(ContextLengthError):
            engine.generate(token_ids=[1] * (ORIGINAL + 1), max_tokens=1)


def test_a_rotation_equal_for_all_lengths_has_the_whole_context(tmp_path: Path) -> None:
    from edgelm.export.source.rotation import steady_length

    assert steady_length(phi(2.0), MOST) == ORIGINAL
    assert steady_length(phi(1.0), MOST) == MOST
    assert steady_length(phi(2.0), ORIGINAL - 1) == ORIGINAL - 1
    assert steady_length(tiny_llama(), 512) == 512


def test_a_rotation_that_changes_with_every_token(tmp_path: Path) -> None:
    """Dynamic NTK starts beyond the model's own context; a folder may give a longer context under another key."""
    from edgelm.export.source.rotation import rotation_name, steady_length

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=128)
    assert steady_length(model, 512) == 128
    assert steady_length(model, 512) == 128, "measuring changes nothing"
    assert rotation_name(model) == "rope_type 'dynamic'"


@pytest.mark.parametrize("kind", sorted(SAME))
def test_other_types_keep_their_context(kind: str) -> None:
    """Each of these rotary embeddings can be evaluated, or has no rotation."""
    from edgelm.export.source.rotation import steady_length

    assert steady_length(tiny_model(kind), MOST) == MOST
