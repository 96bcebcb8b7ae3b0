"""Which matrices get weights of 4, 5, 6 and 8 bits, so that a model fits a number of bytes at the least loss.

4 bits everywhere is the smallest. From there, matrices get more bits step by step, in the order of what a step saves of
the loss for each byte that it costs, as long as the bytes last: a knapsack, filled by worth.

The loss is measured. Matrices of one kind (the same name but for the layer's number) in one part of the layers are a
group. For each group a probe runs, in which these matrices alone have 4 bits, and its answers are held against those of
8 bits everywhere: KL divergence of the next token's distribution. Within a group the loss is shared out by the errors
of the matrices' products on the calibrating text, and of 5 and 6 bits it is as much less as these errors are.
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
    """A matrix. bytes: with each number of bits, from 4 to 8; errors: of its products, in units of the products' size,
    with each number below 8."""

    name: str
    bytes: Mapping[int, int]
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Step:
    """What more bits for a matrix, than those of the step before, save of the loss, in nats a token, and take."""

    name: str
    bits: int
    kl: float
    bytes: int


@dataclass(frozen=True)
class WeightBits:
    """A choice. bits: {matrix: 4, 5, 6 or 8}; kl: what the matrices below 8 bits cost, as measured one group at a time,
    in nats a token; weights_bytes: of all matrices."""

    bits: dict[str, int]
    kl: float
    weights_bytes: int

    def narrow(self) -> dict[str, int]:
        """The matrices below 8 bits, and how many each has."""
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
    """The steps from 4 bits to 8 of each matrix, those that save most for their bytes first.

    probe: a session in which the matrices of these names have 4 bits, all others 8; texts: token ids, of which none is
    judged on later; window_tokens: so many of a text are run at once. Cost: a probe for each group, 48 at most.
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
    """Those that save more for a byte than all later ones: what does not is left out, and later ones start lower."""
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
    """The choice for so many bytes of matrices; 4 bits everywhere where they are not enough for that.

    steps: as of `steps_of`. Where one does not fit, others that do are taken behind it.
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
    """The same bits for all of them; what that costs is not known."""
    return WeightBits({matrix.name: bits for matrix in matrices}, 0.0, sum(matrix.bytes[bits] for matrix in matrices))
