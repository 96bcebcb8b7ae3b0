"""Which matrices get 4 bits and which 8: the choice by bytes, valid requests, and impossible ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edgelm.export import ExportConfig, export_model
from edgelm.export.commands.export import _size
from edgelm.export.commands.sizes import picture
from edgelm.export.errors import RecipeError
from edgelm.export.gate.weight_bits import Candidate, Step, all_in, choose_bits, steps_of
from edgelm.export.sizes import SizePoint, measure_sizes
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.errors import VerificationError
from edgelm.runtime.sessions.protocol import Session
from edgelm.targets import load_target

from .conftest import WIDE_TARGET

# One of each kind for each of 12 layers.
NAMES = [f"layers.{layer}.{kind}.weight" for layer in range(12) for kind in ("up", "down")] + ["head.weight"]
SIZES = {4: 1000, 5: 1250, 6: 1500, 8: 1900}
MATRICES = [
    Candidate(name, SIZES, {bits: scale * error for bits, error in {4: 0.01, 5: 0.003, 6: 0.001}.items()})
    for name in NAMES
    for scale in (2.0 if ".3." in name else 1.0,)
]


class Noisy:
    """A session whose logits are off by the cost of its 4-bit matrices."""

    def __init__(self, narrow: Collection[str]) -> None:
        self._noise = sum({"up": 0.01, "down": 0.1}.get(name.split(".")[-2], 0.3) for name in narrow)

    def rewind(self, length: int) -> None:
        assert length == 0

    def step(self, ids: Any, keep: int) -> Any:
        logits = np.arange(keep * 8, dtype=np.float32).reshape(keep, 8) % 5
        return logits + np.float32(self._noise) * np.sin(np.arange(logits.size, dtype=np.float32)).reshape(keep, 8)


@contextmanager
def probe(narrow: Collection[str]) -> Iterator[Session]:
    yield cast("Session", Noisy(narrow))


def measured() -> list[Step]:
    return steps_of(MATRICES, probe, [list(range(40)), list(range(40))], 32)


def test_steps_of_all_matrices_are_sorted_by_loss_saved_per_byte() -> None:
    steps = measured()
    assert {(step.name, step.bits) for step in steps} == {(name, bits) for name in NAMES for bits in (5, 6, 8)}
    assert (steps[0].name, steps[0].bits) == ("head.weight", 5)
    worth = [step.kl / step.bytes for step in steps]
    assert worth == sorted(worth, reverse=True)
    # In a group of two layers, the matrix with twice the error gets two thirds of the loss.
    first = {step.name: step.kl for step in steps if step.bits == 5}
    assert first["layers.3.up.weight"] == pytest.approx(2 * first["layers.2.up.weight"])


def test_a_width_that_does_not_pay_is_left_out() -> None:
    matrix = Candidate("a.weight", SIZES, {4: 0.01, 5: 0.0099, 6: 0.001})
    steps = steps_of([matrix], lambda names: probe(["a.up.weight" for _ in names]), [list(range(40))], 32)
    assert [step.bits for step in steps] == [6, 8]


def test_a_larger_budget_is_not_worse_and_is_never_exceeded() -> None:
    steps = measured()
    least, most = (all_in(MATRICES, bits).weights_bytes for bits in (4, 8))
    before = choose_bits(MATRICES, steps, 0)
    assert set(before.bits.values()) == {4} and before.weights_bytes == least
    assert before.kl == pytest.approx(sum(step.kl for step in steps))
    for budget in range(least, most + 1000, 700):
        choice = choose_bits(MATRICES, steps, budget)
        assert choice.weights_bytes == sum(SIZES[bits] for bits in choice.bits.values()) <= budget
        assert choice.kl <= before.kl
        before = choice
    assert not before.narrow() and before.kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"), [("90MB", 90_000_000), ("1.5 GB", 1_500_000_000), ("512kib", 524288), ("1234", 1234)]
)
def test_sizes_have_units(text: str, expected: int) -> None:
    assert _size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "9 parsecs", "1e3", "nan"])
def test_an_unreadable_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        _size(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 10**6, "bits": 5.0}, "give one of them"),
        ({"size": 0}, "a size must be more than 0"),
        ({"bits": -1.0}, "bits must be more than 0"),
        ({"bits": float("nan")}, "bits must be more than 0"),
        ({"max_kl": 0.0}, "must be more than 0"),
        ({"bits": 5.0, "scheme": "int8-rowwise"}, "which int8-rowwise cannot"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ExportConfig("model", **settings)


def test_a_budget_selects_the_scheme_with_several_widths() -> None:
    assert ExportConfig("model", bits=5.0).quantization(load_target("x86-cpu")) == "int4-rowwise"
    with pytest.raises(RecipeError, match="float16, which has no scheme 'int4-rowwise'"):
        ExportConfig("model", bits=5.0).quantization(load_target("cuda"))


def test_an_allowed_loss_scales_the_other_limits() -> None:
    gate = load_target("x86-cpu").gate
    wider = gate.allowing(0.2)
    assert (wider.mean_kl, wider.p99_kl) == (0.2, 2.0)
    assert wider.perplexity_increase_percent > gate.perplexity_increase_percent
    assert wider.answers_percent < gate.answers_percent
    stricter = gate.allowing(0.001)
    assert stricter.mean_kl == 0.001 and stricter.p99_kl == gate.p99_kl


# Whole exports


def test_a_bundle_of_a_size_fits_it_and_says_what_it_chose(export_tiny: Callable[..., Path]) -> None:
    bundle = Bundle.open(export_tiny(bits=10.0, max_kl=5.0))
    weights = bundle.manifest.quantization.weights
    assert set(weights.values()) <= {4, 5, 6, 8} and len(set(weights.values())) > 1
    assert set(weights) == set(bundle.manifest.quantization.activations)
    size = (bundle.path / "model.onnx.data").stat().st_size
    assert size <= 10.0 * bundle.manifest.model.parameters / 8
    with load(bundle.path, response_cache=False) as engine:
        assert engine.generate("Once", max_tokens=4).stats.generated_tokens > 0


def test_what_four_bits_may_lose_is_the_targets_to_say(tiny_model: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text('extends = "x86-cpu"\nname = "strict"\n[gate]\nfour_bits_kl = 1e-5\n', encoding="utf-8")
    config = ExportConfig(str(tiny_model), target=str(strict), out=tmp_path / "out", scheme="int4-rowwise")
    with pytest.raises(VerificationError, match=r"the target allows \d\.\d+e-05, "):
        export_model(config)
    strict.write_text(strict.read_text(encoding="utf-8").replace("1e-5", "9"), encoding="utf-8")
    assert export_model(config).manifest.quantization.scheme == "int4-rowwise"


def test_a_whole_bundle_is_within_its_size(tiny_model: Path, tmp_path: Path) -> None:
    size = 345_000
    done = export_model(ExportConfig(str(tiny_model), target=WIDE_TARGET, out=tmp_path / "out", size=size, max_kl=5.0))
    assert sum(path.stat().st_size for path in done.path.iterdir()) <= size
    assert set(done.manifest.quantization.weights.values()) <= {4, 5, 6, 8}
    assert done.report["weights"]["bits"] == done.manifest.quantization.weights


def test_an_impossible_size_is_refused_with_the_possible_ones(tiny_model: Path, tmp_path: Path) -> None:
    config = ExportConfig(str(tiny_model), target=WIDE_TARGET, out=tmp_path / "out", bits=2.0)
    with pytest.raises(RecipeError) as caught:
        export_model(config)
    (line,) = str(caught.value).splitlines()
    assert "the smallest bundle of this model takes" in line and "lm_head.weight alone takes" in line
    assert "nats a token" in line and "MB more than was asked for" in line
    assert not (tmp_path / "out").exists()


def test_all_sizes_are_shown_and_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    points = measure_sizes(ExportConfig(str(tiny_model), target=WIDE_TARGET, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)
    assert points[0].narrow == points[0].matrices and points[-1].narrow == 0
    assert points[-1].mean_kl < points[0].mean_kl


def test_the_picture_falls_from_left_to_right() -> None:
    points = [SizePoint(10**6 * size, size / 10, 1 / size, 0.0, 1.0, 0, 1) for size in (40, 50, 60, 80)]
    rows = picture(points).splitlines()
    places = [(row.index("●"), index) for index, row in enumerate(rows) if "●" in row]
    assert places == sorted(places) and len(places) == 4
    assert "0.0250 nats" in rows[0] and "40.00 MB" in rows[-1] and "80.00 MB" in rows[-1]
