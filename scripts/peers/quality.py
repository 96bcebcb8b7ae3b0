"""The cost of a peer's arithmetic: its distributions against the fp32 model's on a text, and its greedy answers.

Runs inside the peers' environments; needs numpy besides the adapter. Every peer gets the same token ids in the same
windows, each computed without reuse, and returns the logits of the same positions. For this, an adapter's model has

    .logits(ids)                rows (len(ids), vocabulary) of float32, one for each position
    .answer(ids, count, ends)   the greedy tokens that follow, at most `count`, up to the first of `ends`, without it

or, instead of the last, `.answers(prompts, count, ends)`, which returns those of several prompts together.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Rows of logits per computation.
_ROWS = 64
REFERENCE_NAME = "reference.npy"


class Model(Protocol):
    """A loaded model of a peer that returns logits too."""

    def logits(self, ids: list[int]) -> Any:
        """Logits of every position, without reuse of an earlier call."""

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        """Greedy tokens."""


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Begin, end, and the number of leading rows scored by an earlier window, as `edgelm eval` cuts a text.

    Row i of a window predicts its token i + 1, so the last row never counts.
    """
    found, scored = [], 1
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        found.append((begin, end, scored - begin - 1))
        scored = end
        if end == tokens:
            break
    return found


def measure(model: Model, task: dict[str, Any], folder: Path, is_reference: bool) -> dict[str, Any]:
    """Figures of a peer. task: ids, window, stride, prompts, answer_tokens, ends; folder: for the reference's rows,
    which the reference itself writes."""
    figures = on_text(model, task, folder / REFERENCE_NAME, is_reference) if task["ids"] else {}
    return figures | {"answers": _answers(model, task)}


def _answers(model: Any, task: dict[str, Any]) -> list[list[int]]:
    prompts, limits = task["prompts"], (task["answer_tokens"], task["ends"])
    if hasattr(model, "answers"):
        return list(model.answers(prompts, *limits))
    return [model.answer(prompt, *limits) for prompt in prompts]


def on_text(model: Model, task: dict[str, Any], reference: Path, is_reference: bool) -> dict[str, Any]:
    """Perplexity, and divergence from the reference's rows."""
    ids = task["ids"]
    losses: list[float] = []
    divergences: list[float] = []
    same: list[bool] = []
    shape: tuple[int, int] | None = None
    rows: Any = None if is_reference else np.load(reference, mmap_mode="r")
    for begin, end, skip in windows(len(ids), task["window"], task["stride"]):
        logits = np.asarray(model.logits(ids[begin:end]), np.float32)[skip:-1]
        if rows is None:
            shape = (len(ids) - 1, logits.shape[1])
            rows = np.lib.format.open_memmap(reference, "w+", np.float32, shape)
        for first in range(0, len(logits), _ROWS):
            place = begin + skip + first
            ours = log_softmax(logits[first : first + _ROWS])
            targets = ids[place + 1 : place + 1 + len(ours)]
            losses += (-ours[np.arange(len(ours)), targets]).tolist()
            if is_reference:
                rows[place : place + len(ours)] = ours
            theirs = np.asarray(rows[place : place + len(ours), : ours.shape[1]])
            divergences += (np.exp(theirs) * (theirs - ours)).sum(axis=1, dtype=np.float64).tolist()
            same += (theirs.argmax(axis=1) == ours.argmax(axis=1)).tolist()
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "kl": sum(divergences) / len(divergences),
        "kl_p99": float(np.percentile(divergences, 99)),
        "same_token": sum(same) / len(same),
        "tokens": len(losses),
    }


def log_softmax(logits: Any) -> Any:
    """Log probabilities of rows of logits, float32."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def equal_answers(reference: list[list[int]], answers: list[list[int]]) -> dict[str, int]:
    """The number of answers that equal the reference's completely, and the number that begin with its first token."""
    pairs = list(zip(reference, answers, strict=True))
    return {
        "answer_count": len(pairs),
        "equal_answers": sum(ours == theirs for ours, theirs in pairs),
        "equal_first": sum(ours[:1] == theirs[:1] for ours, theirs in pairs),
    }


def read_task(path: Path) -> dict[str, Any]:
    """Read the task written by the script."""
    task: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return task
