"""Looking ahead: what can be told of a recipe before its first step runs, with the model as it came."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import RecipeError, SourceError
from .recipe import step_settings
from .steps import Checked, Step, Workbench, step_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Parts:
    """What there is of a kind, layers or attention sublayers, as the steps so far leave it. left: indexes that may be
    there still; count: how many are, which is less where nobody knows yet which of them go."""

    left: list[int]
    count: int

    def drop(self, choose: Callable[[Collection[int]], list[int]], *, named: bool) -> None:
        """Let a step take some. choose: the step's own choice among these indexes; named: whether the recipe names
        them."""
        gone = choose(self.left if named else self.left[: self.count])
        if named:
            self.left = [index for index in self.left if index not in gone]
        self.count = min(self.count - len(gone), len(self.left))

    def bound(self, others: Parts) -> None:
        """There are no more of these than of others that hold them."""
        self.left = [index for index in self.left if index in others.left]
        self.count = min(self.count, others.count, len(self.left))


@dataclass
class Outlook:
    """The model as it came, and what steps are known to have done to it by the time of the step that is checked.

    bench: as the step will have it; steps: how many were looked at.
    """

    module: PreTrainedModel
    bench: Workbench
    steps: int = 0
    _parts: dict[str, Parts] = field(default_factory=dict)

    def parts(self, kind: str, find: Callable[[PreTrainedModel], Collection[int]]) -> Parts:
        """What there is of a kind. find: where it is, in the model as it came."""
        if kind not in self._parts:
            found = sorted(find(self.module))
            self._parts[kind] = Parts(found, len(found))
        return self._parts[kind]


def look_ahead(steps: Sequence[Step], module: PreTrainedModel, benches: Sequence[Workbench]) -> None:
    """Check every step that can be checked. benches: of each step. Raises: RecipeError, SourceError, which name the
    step."""
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
    """What each step works with: its own folder for checkpoints, and the settings of those before it."""
    settings = [step_settings(step) for step in steps]
    return [
        replace(
            bench,
            checkpoints=bench.checkpoints / f"{index + 1}-{step_name(step)}",
            before=(*bench.before, *settings[:index]),
        )
        for index, step in enumerate(steps)
    ]
