"""Choose for each matrix whether its activations have 8 or 16 bits, by the measured loss of 8 bits.

The starting point is 16 bits everywhere: this loses nothing measurable, and decoding is hardly slower. But a prompt
costs twice the multiply-adds. So 8 bits are used where they save most multiply-adds of a prompt for the least loss.

The loss is measured, not estimated. Matrices of one kind (the same name but for the layer's number) in one third of the
layers are a group. For each group a probe runs, in which only these matrices have 8 bits. Its loss is the KL divergence
of the next token's distribution from that with 16 bits everywhere. Groups are taken in the order of loss for each
multiply-add saved, while the sum stays within the budget. A last probe confirms the choice. The loss of all groups
together may be more than the sum; then the last groups go back to 16 bits.

Tried and rejected: 16 bits only for the largest channels of an activation. On SmolLM2-135M-Instruct, with 128 channels
of 576 (fixed by calibration), this cost 0.0023 nats over 16 bits everywhere, four times the budget.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.evaluation.divergence import divergence, log_softmax
from ...runtime.sessions.protocol import Session

_PARTS = 3
_MOST_GROUPS = 24
# Each window is fed as a whole. Only its later positions count, since they have a context.
_WINDOWS, WINDOW_TOKENS, _JUDGED_TOKENS = 2, 256, 128
_LAYER = re.compile(r"\d+")

# Opens a session on the quantized graph in which the named matrices have activations of 8 bits, and all others of 16.
Probe = Callable[[Collection[str]], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Group:
    """Matrices that get the same bits. name: of the first one; kl: the loss if only this group has 8 bits, in nats a
    token; multiply_adds: saved by 8 bits for a token of a prompt; bits: the choice."""

    name: str
    matrices: tuple[str, ...]
    multiply_adds: int
    kl: float
    bits: int


@dataclass(frozen=True)
class Arithmetic:
    """The choice. activations: {matrix: 8 or 16}; kl: of the chosen graph from 16 bits everywhere, in nats a token;
    saved_percent: share of a prompt's multiply-adds with 16 bits everywhere that is saved."""

    activations: dict[str, int]
    groups: tuple[Group, ...]
    kl: float
    saved_percent: float

    def wide(self) -> list[str]:
        """Names of the matrices with 16 bits."""
        return [name for name, bits in self.activations.items() if bits == 16]

    def widened(self) -> Arithmetic:
        """16 bits everywhere, with what was measured."""
        groups = tuple(replace(group, bits=16) for group in self.groups)
        return Arithmetic(dict.fromkeys(self.activations, 16), groups, 0.0, 0.0)

    def measured(self) -> dict[str, Any]:
        """As plain data for a report: an entry for each group, named after its first matrix. A loss that is not finite
        is the largest float, since JSON has neither NaN nor infinity."""
        rows = [
            {
                "name": group.name if len(group.matrices) == 1 else f"{group.name} and {len(group.matrices) - 1} more",
                "activations": group.bits,
                "kl_if_8": group.kl if math.isfinite(group.kl) else sys.float_info.max,
                "multiply_adds": group.multiply_adds,
            }
            for group in self.groups
        ]
        return {"matrices": rows, "kl_chosen": self.kl, "multiply_adds_saved_percent": self.saved_percent}


def wide_everywhere(matrices: Mapping[str, int]) -> Arithmetic:
    """16 bits for all of them."""
    return Arithmetic(dict.fromkeys(matrices, 16), (), 0.0, 0.0)


def choose_activations(
    matrices: Mapping[str, int],
    probe: Probe,
    texts: Sequence[Sequence[int]],
    budget: float,
    window_tokens: int = WINDOW_TOKENS,
) -> Arithmetic:
    """Choose so that 8 bits add at most `budget` to the loss, in nats a token.

    matrices: multiply-adds of each, as `matrices_of` gives them; texts: token ids, none of which judge later;
    window_tokens: tokens of a text to run at once, within the context. Cost: a probe for each group, 24 at most, and
    some to confirm: each loads the weights and runs 512 tokens.
    """
    loss = loss_against(probe, texts, window_tokens)
    groups = [
        Group(names[0], names, sum(matrices[name] for name in names), loss(names), 16)
        for names in groups_of([name for name, cost in matrices.items() if cost > 0], _PARTS, _MOST_GROUPS)
    ]
    chosen = _within(groups, budget)
    kl = loss(_names(chosen)) if chosen else 0.0
    while chosen and not kl <= budget:
        chosen.pop()
        kl = loss(_names(chosen)) if chosen else 0.0
    return _arithmetic(matrices, groups, chosen, kl)


def loss_against(
    probe: Probe, texts: Sequence[Sequence[int]], window_tokens: int
) -> Callable[[Collection[str]], float]:
    """A function that measures the KL divergence of a probe with some matrices from the probe with none, in nats a
    token."""
    windows = _windows(texts, window_tokens)
    with probe(()) as session:
        expected = [_answers(session, window) for window in windows]

    def loss(names: Collection[str]) -> float:
        with probe(names) as session:
            return _divergence(expected, (_answers(session, window) for window in windows))

    return loss


def _within(groups: Sequence[Group], budget: float) -> list[Group]:
    """The groups that fit into the budget, the least loss for each multiply-add first. A group whose loss is NaN is
    never taken."""
    taken: list[Group] = []
    for group in sorted(groups, key=lambda group: group.kl / group.multiply_adds):
        if sum(item.kl for item in taken) + group.kl <= budget:
            taken.append(group)
    return taken


def _arithmetic(matrices: Mapping[str, int], groups: Sequence[Group], chosen: Sequence[Group], kl: float) -> Arithmetic:
    narrow = _names(chosen)
    total = 2 * sum(matrices.values())
    saved = 100 * sum(matrices[name] for name in narrow) / total if total else 0.0
    return Arithmetic(
        activations={name: 8 if name in narrow else 16 for name in matrices},
        groups=tuple(Group(**{**vars(group), "bits": 8 if group in chosen else 16}) for group in groups),
        kl=kl,
        saved_percent=saved,
    )


def _names(groups: Sequence[Group]) -> set[str]:
    return {name for group in groups for name in group.matrices}


def groups_of(names: Sequence[str], most_parts: int, most_groups: int) -> list[tuple[str, ...]]:
    """Groups of matrices of one kind in one of `most_parts` parts of the layers; with many kinds, in all layers."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_LAYER.sub("#", name), []).append(name)
    parts = most_parts if len(kinds) * most_parts <= most_groups else 1
    found = [tuple(part) for kind in kinds.values() for part in np.array_split(kind, min(parts, len(kind)))]
    return [tuple(str(name) for name in part) for part in found[:most_groups]]


def _windows(texts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Windows from the middle of different texts."""
    step = max(1, len(texts) // _WINDOWS)
    found = []
    for text in list(texts)[::step][:_WINDOWS]:
        begin = max(0, (len(text) - tokens) // 2)
        found.append(list(text[begin : begin + tokens]))
    return found


def _answers(session: Session, window: Sequence[int]) -> NDArray[np.float32]:
    """Log probabilities (judged, vocab_size)."""
    session.rewind(0)
    return log_softmax(session.step(window, min(len(window), _JUDGED_TOKENS)))


def _divergence(expected: Sequence[NDArray[np.float32]], answers: Iterator[NDArray[np.float32]]) -> float:
    kls = np.concatenate([divergence(left, right) for left, right in zip(expected, answers, strict=True)])
    return float(kls.mean())
