"""Choose 4, 5, 6 or 8 bits for the weights of each matrix, so that a model fits a size at the least loss.

All matrices start with 4 bits. Then matrices get more bits step by step, in the order of loss saved for each byte,
until the size is reached (a greedy knapsack).

The loss is measured. Matrices of one kind (the same name but for the layer's number) in one part of the layers are a
group. For each group a probe runs, in which only these matrices have 4 bits. Its loss is the KL divergence of the next
token's distribution from that with 8 bits everywhere. Within a group the loss is divided in proportion to the errors of
the matrices' products on the calibrating text. With 5 and 6 bits it shrinks as these errors do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .arithmetic import WINDOW_TOKENS, Probe, groups_of, loss_against

LEAST, MOST = 4, 8
_PARTS, _MOST_GROUPS = 6, 48


@dataclass(frozen=True)
class Candidate:
    """A matrix. bytes: {bits: size}; errors: {bits below 8: error of its products, relative to their size}."""

    name: str
    bytes: Mapping[int, int]
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Step:
    """More bits for a matrix: the loss that this step saves, in nats a token, and the bytes that it costs."""

    name: str
    bits: int
    kl: float
    bytes: int


@dataclass(frozen=True)
class WeightBits:
    """A choice. bits: {matrix: 4, 5, 6 or 8}; kl: estimated loss of the matrices below 8 bits, from probes of one group
    at a time, in nats a token; weights_bytes: of all matrices."""

    bits: dict[str, int]
    kl: float
    weights_bytes: int

    def narrow(self) -> dict[str, int]:
        """The matrices below 8 bits, with their bits."""
        return {name: bits for name, bits in self.bits.items() if bits < MOST}

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return {"bits": self.bits, "kl_estimated": self.kl, "matrices_bytes": self.weights_bytes}


def steps_of(
    matrices: Sequence[Candidate],
    probe: Probe,
    texts: Sequence[Sequence[int]],
    window_tokens: int = WINDOW_TOKENS,
) -> list[Step]:
    """The steps of all matrices from 4 bits to 8, most loss saved for each byte first.

    probe: a session in which the named matrices have 4 bits, all others 8; texts: token ids, none of which judge later;
    window_tokens: tokens of a text to run at once. Cost: a probe for each group, 48 at most.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    loss = loss_against(probe, texts, window_tokens)
    groups = groups_of(list(by_name), _PARTS, _MOST_GROUPS)
    others = by_name.keys() - {name for names in groups for name in names}
    found: list[Step] = []
    for names in [*groups, *([tuple(sorted(others))] if others else [])]:
        kl = loss(names)
        errors = sum(by_name[name].errors[LEAST] for name in names) or 1.0
        for name in names:
            found += _steps(by_name[name], kl / errors)
    return sorted(found, key=lambda step: (-step.kl / max(step.bytes, 1), step.name, step.bits))


def _steps(matrix: Candidate, kl_of_error: float) -> list[Step]:
    """The useful steps of a matrix: each saves more for a byte than all later ones. Others are merged into the next
    step."""
    errors = {**matrix.errors, MOST: 0.0}
    kept = [LEAST]
    for bits in sorted(errors)[1:]:
        while len(kept) > 1 and _worth(matrix, errors, kept[-1], bits) >= _worth(matrix, errors, kept[-2], kept[-1]):
            kept.pop()
        kept.append(bits)
    return [
        Step(
            matrix.name,
            more,
            kl_of_error * (errors[less] - errors[more]),
            matrix.bytes[more] - matrix.bytes[less],
        )
        for less, more in pairwise(kept)
    ]


def _worth(matrix: Candidate, errors: Mapping[int, float], less: int, more: int) -> float:
    return (errors[less] - errors[more]) / max(matrix.bytes[more] - matrix.bytes[less], 1)


def choose_bits(matrices: Sequence[Candidate], steps: Sequence[Step], budget: int) -> WeightBits:
    """The choice for so many bytes of matrices; 4 bits everywhere if even that does not fit.

    steps: as of `steps_of`. A step that does not fit is skipped; later ones may fit.
    """
    choice = all_in(matrices, LEAST)
    bits, size, kl = choice.bits, choice.weights_bytes, sum(step.kl for step in steps)
    full: set[str] = set()
    for step in steps:
        if step.name in full or size + step.bytes > budget:
            full.add(step.name)
            continue
        bits[step.name], size, kl = step.bits, size + step.bytes, kl - step.kl
    return WeightBits(bits, max(kl, 0.0), size)


def all_in(matrices: Sequence[Candidate], bits: int) -> WeightBits:
    """The same bits for all matrices. The loss is unknown."""
    return WeightBits({matrix.name: bits for matrix in matrices}, 0.0, sum(matrix.bytes[bits] for matrix in matrices))
