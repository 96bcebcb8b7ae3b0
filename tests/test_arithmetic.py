"""The choice between activations of 8 and of 16 bits, matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.gate.arithmetic import Arithmetic, choose_activations, wide_everywhere
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.functions import EDGELM
from edgelm.export.passes.widen_activations import WidenActivations, matrices_of
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.fake import FakeSession

from .conftest import tiny_llama

LAYERS = 6
KINDS = {"attention": 10, "up": 40, "down": 20}
MATRICES = {f"layers.{index}.{kind}": cost for index in range(LAYERS) for kind, cost in KINDS.items()} | {"head": 0}
TEXTS = [list(range(5)), list(range(3, 9))]


class Noisy(FakeSession):
    """A fake session whose logits get noisier with each matrix of 8 bits."""

    def __init__(self, noise: float) -> None:
        super().__init__(11, lambda known: sum(known) % 11)
        self._noise = noise

    def step(self, token_ids, keep=1):  # type: ignore[no-untyped-def]
        logits = super().step(token_ids, keep)
        return logits + self._noise * np.sin(np.arange(logits.size, dtype=np.float32).reshape(logits.shape))


def choose(noise: Mapping[str, float], budget: float, extra: float = 0.0) -> tuple[Arithmetic, list[set[str]]]:
    """noise: by kind of matrix; extra: additional cost of more than one group."""
    probed: list[set[str]] = []

    @contextmanager
    def probe(names: Collection[str]) -> Iterator[Noisy]:
        probed.append(set(names))
        squares = [noise[name.rsplit(".", 1)[1]] ** 2 for name in names]
        kinds = {name.rsplit(".", 1)[1] for name in names}
        yield Noisy(sum(squares) ** 0.5 + (extra if len(kinds) > 1 else 0.0))

    return choose_activations(MATRICES, probe, TEXTS, budget), probed


def bits_of(found: Arithmetic, kind: str) -> set[int]:
    return {bits for name, bits in found.activations.items() if name.endswith(kind)}


def test_matrices_of_low_cost_get_8_bits_and_others_keep_16() -> None:
    found, _ = choose({"attention": 1e-3, "up": 1e-3, "down": 1.0}, 1e-3)
    assert bits_of(found, "attention") == bits_of(found, "up") == {8}
    assert bits_of(found, "down") == {16}
    assert found.activations["head"] == 16
    assert found.kl <= 1e-3
    assert found.saved_percent == pytest.approx(100 * 50 / 70 / 2)
    assert set(found.wide()) == {name for name in MATRICES if name.endswith(("down", "head"))}


def test_groups_with_most_multiply_adds_per_loss_come_first() -> None:
    """All kinds cost the same; the budget covers only some groups."""
    _, probed = choose({"attention": 0.1, "up": 0.1, "down": 0.1}, 1.0)
    one_group = choose({"attention": 0.1, "up": 0.1, "down": 0.1}, 0.0)[0].groups[0].kl
    found, _ = choose({"attention": 0.1, "up": 0.1, "down": 0.1}, 3.5 * one_group)
    assert bits_of(found, "up") == {8}
    assert bits_of(found, "attention") == {16}
    assert probed[0] == set()


def test_groups_that_cost_more_together_return_to_16_bits() -> None:
    found, probed = choose({"attention": 1e-3, "up": 1e-3, "down": 1.0}, 1e-3, extra=1.0)
    assert bits_of(found, "up") == {8}
    assert bits_of(found, "attention") == {16}
    assert found.kl <= 1e-3
    assert probed[-1] == {name for name, bits in found.activations.items() if bits == 8}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_16_bits(loss: float) -> None:
    found, _ = choose({"attention": loss, "up": loss, "down": loss}, 1.0)
    assert set(found.activations.values()) == {16}
    assert found.kl == 0
    assert json.loads(json.dumps(found.measured(), allow_nan=False))["matrices"]


def test_16_bits_everywhere_keep_what_was_measured() -> None:
    chosen, _ = choose({"attention": 1e-3, "up": 1e-3, "down": 1.0}, 1e-3)
    assert 8 in chosen.activations.values()
    wide = chosen.widened()
    assert set(wide.activations.values()) == {16} == {group.bits for group in wide.groups}
    assert [group.kl for group in wide.groups] == [group.kl for group in chosen.groups]
    assert (wide.kl, wide.saved_percent) == (0.0, 0.0)


def test_no_budget_is_16_bits_everywhere() -> None:
    found, _ = choose({"attention": 0.1, "up": 0.1, "down": 0.1}, 0.0)
    assert found.activations == wide_everywhere(MATRICES).activations
    assert [group.bits for group in found.groups] == [16] * 9


def quantized() -> ir.Model:
    traced = trace_model(tiny_llama())
    ir.passes.PassManager([*fusing_passes(512), *quantizing_passes("int8-rowwise", 8, {})])(traced.graph)
    return traced.graph


def test_named_matrices_and_no_others_are_widened() -> None:
    graph = quantized()
    matrices = matrices_of(graph)
    assert len(matrices) == 4 * 2 + 1
    head = next(reversed(matrices))
    assert [name for name, cost in matrices.items() if cost == 0] == [head]
    down = [name for name in matrices if "down_proj" in name]
    assert [matrices[name] for name in down] == [96 * 64] * 2
    assert WidenActivations([*down, head])(graph).modified
    calls = [node.op_type for node in graph.graph if node.domain == EDGELM and "MatMul" in node.op_type]
    assert [name for name in calls if name.endswith("16")] == [
        "GatedRowwiseMatMul16",
        "GatedRowwiseMatMul16",
        "RowwiseMatMulTransposed16",
    ]
    assert matrices_of(graph) == matrices
    assert not WidenActivations([*down, head])(graph).modified
