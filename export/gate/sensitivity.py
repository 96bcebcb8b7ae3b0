"""The loss of quantizing each matrix alone: all others stay float32, and the shipping runtime computes.

The measure is the KL divergence of the next token's distribution from fp32's with only that matrix quantized, in nats,
mean over 256 tokens of a passage. Unlike perplexity it is never negative, so few tokens are enough to rank matrices.

Cost: for each probe onnxruntime loads the fp32 weights once and runs 256 tokens.

`by_matrix`  up to 48 matrices are probed one by one. If there are more, the matrices of a layer are probed together,
             and then those of the worst layers one by one, with up to 48 more probes.
`by_layers`  consecutive layers are probed together, in 4 runs of about equal length; matrices outside of layers are
             one more run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.evaluation.divergence import divergence, log_softmax
from ...runtime.sessions.protocol import Session
from .reference import Passage

MOST_PROBES = 48
LAYER_RUNS = 4
_TOKENS = 256
_PIECE_TOKENS = 128
_LAYER = re.compile(r"(.*?\.(\d+))\.")

# Opens a session on the graph in which only the named matrices are quantized.
Probe = Callable[[Collection[str]], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Sensitivity:
    """The loss of quantizing some matrices and nothing else.

    name: of the matrix, or of the layer whose matrices were measured together; matrices: their names; kl: in nats.
    """

    name: str
    matrices: tuple[str, ...]
    kl: float

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return {"name": self.name, "matrices": len(self.matrices), "kl": self.kl}


# Takes a text that the fp32 graph has read, a probe, and the names of all matrices. Returns sensitivities, the worst
# first, each matrix in one of them.
Measure = Callable[[Passage, Probe, Sequence[str]], list[Sensitivity]]


def by_matrix(passage: Passage, probe: Probe, matrices: Sequence[str]) -> list[Sensitivity]:
    """See `Measure` and the module."""
    measure = _measure(passage, probe)
    found = _ranked(measure(name, names) for name, names in _groups(matrices).items())
    left = MOST_PROBES
    for group in [item for item in found if len(item.matrices) > 1]:
        left -= len(group.matrices)
        if left < 0:
            break
        found.remove(group)
        found += [measure(name, (name,)) for name in group.matrices]
    return _ranked(found)


def by_layers(passage: Passage, probe: Probe, matrices: Sequence[str]) -> list[Sensitivity]:
    """See `Measure` and the module."""
    measure = _measure(passage, probe)
    return _ranked(measure(name, names) for name, names in _runs_of_layers(matrices).items())


def _measure(passage: Passage, probe: Probe) -> Callable[[str, tuple[str, ...]], Sensitivity]:
    """A function that measures some matrices and gives them a name."""
    tokens = passage.token_ids[:-1][:_TOKENS]

    def measure(name: str, names: tuple[str, ...]) -> Sensitivity:
        total, begin = 0.0, 0
        with probe(names) as session:
            for got in log_probabilities(session, tokens):
                expected = passage.log_probabilities(begin, begin + len(got))
                total += float(divergence(expected, got).sum())
                begin += len(got)
        # NaN counts as the worst.
        return Sensitivity(name, names, total / len(tokens) if np.isfinite(total) else float("inf"))

    return measure


def _runs_of_layers(matrices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    layers: dict[int, list[str]] = {}
    others = []
    for name in matrices:
        layer = _LAYER.match(name)
        layers.setdefault(int(layer.group(2)), []).append(name) if layer is not None else others.append(name)
    runs = {}
    for run in np.array_split(sorted(layers), min(LAYER_RUNS, len(layers)) or 1):
        if len(run):
            name = f"layers {run[0]} to {run[-1]}" if len(run) > 1 else f"layer {run[0]}"
            runs[name] = tuple(matrix for layer in run for matrix in layers[int(layer)])
    return {**runs, "embedding and head": tuple(others)} if others else runs


def _groups(matrices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each matrix by itself, or by layers if there are too many."""
    groups: dict[str, tuple[str, ...]] = {}
    for matrix in matrices:
        layer = _LAYER.match(matrix) if len(matrices) > MOST_PROBES else None
        name = layer.group(1) if layer is not None else matrix
        groups[name] = (*groups.get(name, ()), matrix)
    return {name if len(names) > 1 else names[0]: names for name, names in groups.items()}


def _ranked(found: Collection[Sensitivity] | Iterator[Sensitivity]) -> list[Sensitivity]:
    return sorted(found, key=lambda item: (-item.kl, item.name))


def log_probabilities(session: Session, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """log softmax of the logits at each token, in pieces (n, vocab_size)."""
    session.rewind(0)
    for begin in range(0, len(token_ids), _PIECE_TOKENS):
        piece = token_ids[begin : begin + _PIECE_TOKENS]
        yield log_softmax(session.step(piece, len(piece)))
