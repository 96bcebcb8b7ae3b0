"""Training steps in report.json: their curves and samples. Standard library only.

A report may come from another version of edgelm: missing values are omitted, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .figures import number_of, tables_of


@dataclass(frozen=True)
class TrainingCurve:
    """The record of one training step of a recipe. steps: number of optimizer steps; points: evaluations, in order;
    samples: prompts with the continuations of source and model; words: the held-out text and the weights kept."""

    use: str
    steps: int
    points: list[dict[str, Any]]
    samples: list[dict[str, str]]
    words: str

    def charts(self) -> list[tuple[str, list[tuple[str, str, list[tuple[float, float]]]]]]:
        """Title and series of each chart with at least two points; a series is a name, a colour, and its points."""
        loss = [("training", "before", self._series("loss")), ("held out", "after", self._series("held_out_loss"))]
        kl = [("KL from the source", "after", self._series("kl"))]
        words = [("last words, %", "after", self._series("last_words_percent"))]
        titles = (("Loss, nats a token", loss), ("KL divergence from the source", kl), ("Last words", words))
        found = [(title, [item for item in series if len(item[2]) > 1]) for title, series in titles]
        return [(title, series) for title, series in found if series]

    def _series(self, key: str) -> list[tuple[float, float]]:
        places = [(number_of(point, "step"), number_of(point, key)) for point in self.points]
        return [(step, value) for step, value in places if step is not None and value is not None]


def training_curves(steps: Any) -> list[TrainingCurve]:
    """One curve for each training step. steps: report.json's `compression`."""
    return [
        TrainingCurve(
            str(step.get("use")),
            max((int(number_of(point, "step") or 0) for point in tables_of(found.get("curve"))), default=0),
            tables_of(found.get("curve")),
            [
                {key: str(sample.get(key, "")) for key in ("prompt", "source", "after")}
                for sample in tables_of(found.get("samples"))
            ],
            _training_words(found),
        )
        for step in tables_of(steps)
        if isinstance(found := step.get("training"), dict)
    ]


def _training_words(training: dict[str, Any]) -> str:
    tokens, kept, stopped = (number_of(training, key) for key in ("held_out_tokens", "kept_step", "stopped_after"))
    held = f"held out: {tokens:,.0f} tokens of {training.get('held_out')}" if tokens else "no held-out text"
    early = f"; training stopped early, after step {stopped:,.0f}" if stopped is not None else ""
    return f"{held}; the weights are those of step {kept or 0:,.0f}{early}."
