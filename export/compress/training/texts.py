"""What a step trains on, and what it is judged by, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingTexts:
    """training: token ids to train on; held_out: others, or none; origin: of those, in words."""

    training: list[int]
    held_out: list[int]
    origin: str
