"""The gate's repair: matrices that INT8 spoils, and no others, are left in float32, or the export fails.

The tests use `int8-tensor`; `int8-rowwise` is not repaired in this way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgelm.export import ExportConfig, export_model
from edgelm.export.gate.quality import QuantizedAgreement
from edgelm.export.gate.reference import Passage
from edgelm.export.gate.repair import repair
from edgelm.export.gate.sensitivity import LAYER_RUNS, MOST_PROBES, Sensitivity, by_layers, by_matrix
from edgelm.export.passes import functions, fusing_passes
from edgelm.export.passes.quantize_linears import ROWWISE_SCHEMES
from edgelm.export.quantization.quantizer import Quantizer
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.cli import main
from edgelm.runtime.errors import VerificationError
from edgelm.targets import Limits, load_target

from .conftest import byte_tokenizer, tiny_llama

HOSTILE = "model.layers.1.mlp.down_proj.weight"
GATE = load_target("x86-cpu").gate
COARSE = load_target("x86-cpu").coarse_gate


def hostile_model(folder: Path, layers: Collection[int]) -> Path:
    """The tiny model with one huge input, always zero, in the down projections of these layers. It changes nothing in
    float32, but in INT8 it spoils the scales of all columns."""
    import torch

    model = tiny_llama()
    with torch.no_grad():
        for layer in layers:
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[0] = 0
            mlp.down_proj.weight[:, 0] = 1000
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def target_with_gate(folder: Path, **gate: float) -> str:
    """A target file like x86-cpu, with another gate for all schemes."""
    path = folder / "strict.toml"
    lines = {key: f"{key} = {value}\n" for key, value in gate.items()}
    coarse = [lines[field.name] for field in dataclasses.fields(Limits) if field.name in lines]
    text = ['extends = "x86-cpu"\nname = "strict"\n[gate]\n', *lines.values(), "[coarse_gate]\n", *coarse]
    path.write_text("".join(text), encoding="utf-8")
    return str(path)


WIDE = {"mean_kl": 9.0, "p99_kl": 9.0, "answers_percent": 0.0}


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a model with one matrix that INT8 spoils."""
    folder = tmp_path_factory.mktemp("hostile")
    model = hostile_model(folder / "model", [1])
    config = ExportConfig(str(model), target="x86-cpu", scheme="int8-tensor", out=folder / "bundle")
    return export_model(config).path


def test_the_one_hostile_matrix_is_left_in_float32(repaired: Path) -> None:
    manifest = Bundle.open(repaired).manifest
    (excluded,) = manifest.quantization.excluded
    assert excluded.name == HOSTILE
    assert "nats" in excluded.reason
    assert "perplexity rose by" in excluded.reason
    assert manifest.quality["against_fp32"]["mean_kl"] <= COARSE.mean_kl
    initializers = ir.load(repaired / "model.onnx").graph.initializers
    assert initializers[HOSTILE].dtype == ir.DataType.FLOAT
    assert initializers["model.layers.0.mlp.down_proj.weight.int8"].dtype == ir.DataType.INT8
    assert f"{HOSTILE}.int8" not in initializers


def test_the_report_ranks_all_matrices(repaired: Path) -> None:
    found = json.loads((repaired / "report.json").read_text(encoding="utf-8"))["sensitivity"]
    assert len(found) == 2 * 4 + 1, "four matrices a layer, and the tied embedding"
    assert found[0]["name"] == HOSTILE
    costs = [item["kl"] for item in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 10 * costs[1] > 0


def test_the_repaired_bundle_runs_and_verifies(repaired: Path) -> None:
    assert main(["verify", str(repaired)]) == 0
    with load(repaired) as engine:
        assert engine.generate("Once upon a time", max_tokens=8).stats.generated_tokens > 0


def test_row_wise_int8_is_refused_and_not_repaired(tmp_path: Path) -> None:
    """No attempt repairs the spoilt matrix, and float32 does not help either: the error has the figures, and nothing
    is written."""
    model, out = hostile_model(tmp_path / "model", [1]), tmp_path / "bundle"
    with pytest.raises(VerificationError, match=r"nats from fp32's, .*: use --kv float32, --scheme int8-weight or"):
        export_model(ExportConfig(str(model), target="x86-cpu", out=out))
    assert not out.exists()


def test_nothing_is_excluded_if_the_gate_passes(tiny_bundle: Path) -> None:
    assert Bundle.open(tiny_bundle).manifest.quantization.excluded == ()
    report = json.loads((tiny_bundle / "report.json").read_text(encoding="utf-8"))
    assert len(report["sensitivity"]) == 2 * 4 + 1


def test_an_fp32_export_has_no_sensitivity(export_tiny: Callable[..., Path]) -> None:
    report = json.loads((export_tiny(scheme="fp32") / "report.json").read_text(encoding="utf-8"))
    assert report["sensitivity"] == []


def test_a_model_that_cannot_pass_fails_with_the_figures(tiny_model: Path, tmp_path: Path) -> None:
    """The gate demands every token of fp32, including ties; with half of the matrices in INT8 that is impossible."""
    target = target_with_gate(
        tmp_path, **WIDE, decided_margin=0.0, agreement_percent=100.0, perplexity_increase_percent=9.0
    )
    out = tmp_path / "bundle"
    with pytest.raises(VerificationError, match=r"the same at .* %.*; with .* in float32: .*--scheme fp32"):
        export_model(ExportConfig(str(tiny_model), target=target, scheme="int8-tensor", out=out))
    assert not out.exists()


def test_if_only_the_cache_fails_no_matrix_is_blamed(tiny_model: Path, tmp_path: Path) -> None:
    target = target_with_gate(tmp_path, cache_kl_limit=1e-12)
    with pytest.raises(VerificationError, match=r"the INT8 cache does not suit this model: .*--kv float32"):
        export_model(ExportConfig(str(tiny_model), target=target, out=tmp_path / "bundle"))
    ranked = [Sensitivity("a", ("a",), 1.0)]
    with pytest.raises(VerificationError, match=r"with all matrices in float32: .*--kv float32"):
        repair(agreement(80.0), ranked, lambda names: agreement(50.0), GATE)


class Biased:
    """A session of 4 tokens whose logits are biased towards the first."""

    def __init__(self, pull: float) -> None:
        self._pull = pull
        self.length = 0

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        self.length += len(token_ids)
        return np.tile(np.array([self._pull, 0, 0, 0], np.float32), (keep, 1))

    def rewind(self, length: int) -> None:
        self.length = length

    def close(self) -> None:
        pass


def passage(folder: Path, tokens: int = 301) -> Passage:
    """A text that a session without a pull has read."""
    path = folder / "text.npy"
    np.save(path, np.full((tokens - 1, 4), np.log(0.25), np.float16))
    unused = np.zeros(tokens - 1)
    return Passage("prose", [0] * tokens, 0, path, unused.astype(np.int64), unused, unused)


def probing(pulls: dict[str, float], probed: list[tuple[str, ...]]) -> Any:
    @contextmanager
    def probe(names: Collection[str]) -> Iterator[Biased]:
        probed.append(tuple(names))
        yield Biased(sum(pulls[name] for name in names))

    return probe


def test_the_measure_is_the_divergence_of_the_next_token(tmp_path: Path) -> None:
    (found,) = by_matrix(passage(tmp_path), probing({"a": 1.0}, []), ["a"])
    expected, got = np.full(4, 0.25), np.exp([1.0, 0, 0, 0]) / np.exp([1.0, 0, 0, 0]).sum()
    assert found.kl == pytest.approx(float((expected * np.log(expected / got)).sum()), rel=1e-5)


def test_nan_ranks_worst(tmp_path: Path) -> None:
    found = by_matrix(passage(tmp_path), probing({"a": 1.0, "b": np.nan}, []), ["a", "b"])
    assert [item.name for item in found] == ["b", "a"]


def test_many_matrices_are_measured_by_layer_and_the_worst_layers_one_by_one(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{side}.weight" for layer in range(40) for side in ("in", "out")] + ["head"]
    pulls = {name: 2.0 if name == "model.layers.7.out.weight" else 0.01 for name in names}
    probed: list[tuple[str, ...]] = []
    found = by_matrix(passage(tmp_path), probing(pulls, probed), names)
    assert found[0].matrices == ("model.layers.7.out.weight",)
    assert sorted(name for item in found for name in item.matrices) == sorted(names), "each matrix is in one entry"
    assert len(probed) <= 41 + MOST_PROBES
    assert ("model.layers.3.in.weight", "model.layers.3.out.weight") in probed


def test_layers_that_follow_each_other_are_measured_together_in_few_runs(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{side}.weight" for layer in range(16) for side in ("in", "out")] + ["head"]
    pulls = {name: 2.0 if name == "model.layers.7.out.weight" else 0.01 for name in names}
    probed: list[tuple[str, ...]] = []
    found = by_layers(passage(tmp_path), probing(pulls, probed), names)
    assert found[0].name == "layers 4 to 7"
    assert {item.name for item in found} >= {"layers 0 to 3", "layers 12 to 15", "embedding and head"}
    assert sorted(name for item in found for name in item.matrices) == sorted(names), "each matrix is in one entry"
    assert len(probed) == LAYER_RUNS + 1


def test_a_probe_computes_with_the_activations_that_were_chosen(tmp_path: Path) -> None:
    traced = trace_model(tiny_llama())
    ir.passes.PassManager(fusing_passes(512))(traced.graph)
    ir.save(traced.graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    quantizer = Quantizer(tmp_path / "model.onnx", ROWWISE_SCHEMES[0], 8, {})
    probe = quantizer.alone(quantizer.matrices[:3], wide=quantizer.matrices[:1])
    products = [node.op_type for node in probe.graph if node.op_type in functions.PRODUCTS]
    assert len(products) == 3
    assert sum(name.endswith(functions.WIDE) for name in products) == 1


def test_a_model_with_few_layers_has_a_run_for_each(tmp_path: Path) -> None:
    names = ["model.layers.0.in.weight", "model.layers.1.in.weight"]
    found = by_layers(passage(tmp_path), probing(dict.fromkeys(names, 0.1), []), names)
    assert [item.name for item in found] == ["layer 0", "layer 1"]


def agreement(rise: float) -> QuantizedAgreement:
    return QuantizedAgreement(10.0, 10.0 + rise / 10, rise, 0.1, 0.001, 0.01, 99.0, 99.0, 100, 500, 128)


def test_as_few_matrices_as_possible_are_excluded() -> None:
    ranked = [Sensitivity(name, (name,), cost) for name, cost in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.5))]
    tried: list[set[str]] = []

    def attempt(excluded: Collection[str]) -> QuantizedAgreement:
        tried.append(set(excluded))
        return agreement(0.0 if {"a", "b"} <= set(excluded) else 50.0)

    after, excluded = repair(agreement(80.0), ranked, attempt, GATE)
    assert after.perplexity_increase_percent == 0
    assert [item.name for item in excluded] == ["a", "b"]
    assert tried == [{"a", "b", "c", "d"}, {"a"}, {"a", "b"}]


def test_more_than_half_of_the_matrices_is_no_repair() -> None:
    ranked = [Sensitivity(name, (name,), 1.0) for name in "abcd"]
    with pytest.raises(VerificationError, match=r"80\.00 %.*with a, b in float32.*50\.00 %"):
        repair(agreement(80.0), ranked, lambda names: agreement(0.0 if len(names) > 2 else 50.0), GATE)
