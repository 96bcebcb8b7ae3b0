"""The gate on a real model: random weights have no outliers that 8 bits would lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.runtime.bundle.folder import Bundle
from edgelm.targets import load_target

GATE = load_target("x86-cpu").gate


@pytest.mark.slow
def test_8_bit_activations_everywhere_are_replaced_by_16_bits(real_model: Path, tmp_path: Path) -> None:
    """The target lets every matrix take activations of 8 bits: the gate finds 0.04 nats and writes the next attempt, 16
    bits everywhere."""
    target = tmp_path / "narrow.toml"
    target.write_text('extends = "x86-cpu"\nname = "narrow"\n[gate]\nactivations_kl = 9.0\n', encoding="utf-8")
    done = export_model(ExportConfig(str(real_model), target=str(target), out=tmp_path / "bundle"))
    assert set(Bundle.open(done.path).manifest.quantization.activations.values()) == {16}
    assert done.report["against_fp32"]["mean_kl"] <= GATE.mean_kl
    assert done.manifest.quantization.excluded == ()


def test_the_default_bundle_is_within_its_limits_on_every_kind_of_text(real_bundle: Path) -> None:
    report = json.loads((real_bundle / "report.json").read_text(encoding="utf-8"))
    found = report["against_fp32"]
    assert found["tokens"] > 4000
    assert [kind["kind"] for kind in found["kinds"]] == ["code", "dialogue", "french", "prose"]
    assert found["mean_kl"] <= GATE.mean_kl
    assert all(kind["mean_kl"] <= 2 * GATE.mean_kl for kind in found["kinds"])
    assert found["answers"]["decided_percent"] >= GATE.answers_percent
    assert Bundle.open(real_bundle).manifest.quantization.excluded == ()
    (capital,) = [example for example in report["examples"] if example["prompt"] == "What is the capital of France?"]
    assert capital["fp32"] == "The capital of France is Paris."
    assert "Paris" in capital["quantized"]
