"""Training and held-out text of a step, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingTexts:
    """training: token ids; held_out: other token ids, may be empty; origin: source of held_out, in words."""

    training: list[int]
    held_out: list[int]
    origin: str
