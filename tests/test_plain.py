"""Bundles of the plain path: models whose attention is not in transformers' registry, or that keep other states.

tests/test_models.py checks for each type that such models answer as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import ExportError
from edgelm.export.tracing.ways import STEPWISE
from edgelm.runtime import load
from edgelm.runtime.cli import main

from .conftest import TEXT, WIDE_TARGET, byte_tokenizer
from .model_zoo import CONTEXT, SAME, tiny_model


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a tiny model of a type with the default settings, once; returns the bundle."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            tiny_model(kind).save_pretrained(folder / "model")
            byte_tokenizer(folder / "model")
            done[kind] = export_model(
                ExportConfig(str(folder / "model"), target=WIDE_TARGET, out=folder / "bundle")
            ).path
        return done[kind]

    return run


@pytest.mark.parametrize("kind", ["bloom", "lfm2", "mamba2"])
def test_the_path_is_found_by_trial_and_the_bundle_answers(export: Callable[[str], Path], kind: str) -> None:
    with load(export(kind), response_cache=False) as engine:
        model = engine.bundle.manifest.model
        assert (model.context_length == CONTEXT) == (kind == "lfm2"), "without positions a context has no end"
        assert model.cache_layout == "concatenated" and model.kv.type == "float32"
        assert (model.step_tokens == 1) == (SAME[kind] == STEPWISE)
        assert bool(model.states) == (kind in ("lfm2", "mamba2"))
        assert engine.bundle.manifest.quantization.scheme == "int8-rowwise"
        first = engine.generate(TEXT[:60], max_tokens=12)
        longer = engine.generate(TEXT[:80], max_tokens=12)
        # Keys and values can be cut to the common prefix of two prompts; a convolution or a recurrence starts over.
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
    tiny_model("bloom").save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    with pytest.raises(ExportError, match="cannot be int8: leave --kv out"):
        export_model(ExportConfig(str(tmp_path / "model"), kv="int8", target="x86-cpu", out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
