"""Checks of a recipe against the source model, made before the first step runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RecipeError, SourceError
from .recipe import step_settings
from .step import Checked, Outlook, Step, Workbench, step_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def look_ahead(steps: Sequence[Step], module: PreTrainedModel, benches: Sequence[Workbench]) -> None:
    """Check every step that can be checked. benches: one per step. Raises: RecipeError, SourceError with the step's
    name."""
    outlook = Outlook(module, benches[0])
    for number, (step, bench) in enumerate(zip(steps, benches, strict=True), 1):
        outlook.bench = bench
        if isinstance(step, Checked):
            try:
                step.check(outlook)
            except (RecipeError, SourceError) as error:
                raise type(error)(f"step {number}, {step_name(step)}: {error}") from error
        outlook.steps = number


def step_benches(steps: Sequence[Step], bench: Workbench) -> list[Workbench]:
    """One workbench per step, with its own checkpoint folder and the settings of the steps before it."""
    settings = [step_settings(step) for step in steps]
    return [
        replace(
            bench,
            checkpoints=bench.checkpoints / f"{index + 1}-{step_name(step)}",
            before=(*bench.before, *settings[:index]),
        )
        for index, step in enumerate(steps)
    ]
