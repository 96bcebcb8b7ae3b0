"""How much each matrix loses by INT8, measured alone: all others stay float32, and the runtime that ships computes.

The measure is the KL divergence of the next token's distribution, fp32 graph against the graph with that one matrix
quantized, in nats, mean over 256 tokens of the text. Unlike perplexity it is never negative, so that it ranks matrices
on few tokens.

Cost: for each probe onnxruntime loads the fp32 weights once and runs 256 tokens; beside that, the fp32 distributions
stay in memory (256 x vocabulary float32).

`by_matrix`  up to 48 matrices are probed one by one. Where there are more, the matrices of a layer are probed together,
             and those of the worst layers then one by one, as far as 48 more probes go.
`by_layers`  layers that follow each other are probed together, in 4 runs of about one length, and what belongs to no
             layer in one more.
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

MOST_PROBES = 48
LAYER_RUNS = 4
_TOKENS = 256
_PIECE_TOKENS = 128
_LAYER = re.compile(r"(.*?\.(\d+))\.")

# Opens a session on the graph in which only the matrices of these names are quantized.
Probe = Callable[[Collection[str]], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing some matrices, and nothing else, costs.

    name: of the matrix, or of the layer whose matrices were measured together; matrices: their names; kl: in nats.
    """

    name: str
    matrices: tuple[str, ...]
    kl: float

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return {"name": self.name, "matrices": len(self.matrices), "kl": self.kl}


# From a session on the fp32 graph, a probe, the names of all matrices and at least two tokens, no more than the model's
# context, to the sensitivities: each matrix in one of them, the worst first.
Measure = Callable[[Session, Probe, Sequence[str], Sequence[int]], list[Sensitivity]]


def by_matrix(reference: Session, probe: Probe, matrices: Sequence[str], token_ids: Sequence[int]) -> list[Sensitivity]:
    """See `Measure` and the module."""
    measure = _measure(reference, probe, token_ids)
    found = _ranked(measure(name, names) for name, names in _groups(matrices).items())
    left = MOST_PROBES
    for group in [item for item in found if len(item.matrices) > 1]:
        left -= len(group.matrices)
        if left < 0:
            break
        found.remove(group)
        found += [measure(name, (name,)) for name in group.matrices]
    return _ranked(found)


def by_layers(reference: Session, probe: Probe, matrices: Sequence[str], token_ids: Sequence[int]) -> list[Sensitivity]:
    """See `Measure` and the module."""
    measure = _measure(reference, probe, token_ids)
    return _ranked(measure(name, names) for name, names in _runs_of_layers(matrices).items())


def _measure(
    reference: Session, probe: Probe, token_ids: Sequence[int]
) -> Callable[[str, tuple[str, ...]], Sensitivity]:
    """What measures some matrices under a name."""
    tokens = list(token_ids[:_TOKENS])
    expected = list(log_probabilities(reference, tokens))

    def measure(name: str, names: tuple[str, ...]) -> Sensitivity:
        with probe(names) as session:
            pairs = zip(expected, log_probabilities(session, tokens), strict=True)
            total = sum(float(divergence(left, right).sum()) for left, right in pairs)
        # What is not a number is worst of all.
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
    """Each matrix by itself, or with the others of its layer where there are too many."""
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
