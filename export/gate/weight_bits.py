"""Which matrices get weights of 4 bits and which of 8, so that a model fits a number of bytes at the least loss.

4 bits everywhere is the smallest. From there, matrices get 8 bits in the order of what that saves of the loss for each
byte that it costs, as long as the bytes last: a knapsack, filled by worth. A larger budget so gets what a smaller one
has, and more, and is never worse.

The loss is measured. Matrices of one kind (the same name but for the layer's number) in one part of the layers are a
group. For each group a probe runs, in which these matrices alone have 4 bits, and its answers are held against those of
8 bits everywhere: KL divergence of the next token's distribution. Within a group the loss is shared out by the errors
of the matrices' products on the calibrating text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arithmetic import WINDOW_TOKENS, Probe, groups_of, loss_against

_PARTS, _MOST_GROUPS = 6, 48


@dataclass(frozen=True)
class Candidate:
    """A matrix. narrow_bytes, wide_bytes: with 4 and with 8 bits; error: of its products with 4 bits, in units of the
    products' size."""

    name: str
    narrow_bytes: int
    wide_bytes: int
    error: float


@dataclass(frozen=True)
class Cost:
    """What 4 bits cost a matrix, in nats a token, and what 8 bits would take more, in bytes."""

    name: str
    kl: float
    bytes: int


@dataclass(frozen=True)
class WeightBits:
    """A choice. bits: {matrix: 4 or 8}; kl: what the matrices with 4 bits cost, as measured one group at a time, in
    nats a token; weights_bytes: of all matrices."""

    bits: dict[str, int]
    kl: float
    weights_bytes: int

    def narrow(self) -> list[str]:
        """Names of the matrices with 4 bits."""
        return [name for name, bits in self.bits.items() if bits == 4]

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return {"bits": self.bits, "kl_estimated": self.kl, "matrices_bytes": self.weights_bytes}


def costs_of(
    matrices: Sequence[Candidate],
    probe: Probe,
    texts: Sequence[Sequence[int]],
    window_tokens: int = WINDOW_TOKENS,
) -> list[Cost]:
    """What each matrix loses by 4 bits, the worst for its bytes first.

    probe: a session in which the matrices of these names have 4 bits; texts: token ids, of which none is judged on
    later; window_tokens: so many of a text are run at once. Cost: a probe for each group, 48 at most.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    loss = loss_against(probe, texts, window_tokens)
    found = []
    groups = groups_of(list(by_name), _PARTS, _MOST_GROUPS)
    others = by_name.keys() - {name for names in groups for name in names}
    for names in [*groups, *([tuple(sorted(others))] if others else [])]:
        kl = loss(names)
        errors = sum(by_name[name].error for name in names) or 1.0
        for name in names:
            matrix = by_name[name]
            found.append(Cost(name, kl * matrix.error / errors, matrix.wide_bytes - matrix.narrow_bytes))
    return sorted(found, key=lambda cost: (-cost.kl / max(cost.bytes, 1), cost.name))


def choose_bits(matrices: Sequence[Candidate], costs: Sequence[Cost], budget: int) -> WeightBits:
    """The choice for so many bytes of matrices; 4 bits everywhere where they are not enough for that.

    costs: as of `costs_of`.
    """
    left = budget - sum(matrix.narrow_bytes for matrix in matrices)
    bits = {matrix.name: 4 for matrix in matrices}
    for cost in costs:
        if cost.bytes <= left:
            bits[cost.name], left = 8, left - cost.bytes
    return _weight_bits(matrices, costs, bits)


def all_in(matrices: Sequence[Candidate], bits: int) -> WeightBits:
    """The same bits for all of them; what that costs is not known."""
    return _weight_bits(matrices, (), {matrix.name: bits for matrix in matrices})


def _weight_bits(matrices: Sequence[Candidate], costs: Sequence[Cost], bits: Mapping[str, int]) -> WeightBits:
    return WeightBits(
        dict(bits),
        sum(cost.kl for cost in costs if bits[cost.name] == 4),
        sum(matrix.narrow_bytes if bits[matrix.name] == 4 else matrix.wide_bytes for matrix in matrices),
    )
