"""What a step of a recipe is, and which there are.

A step is a frozen dataclass. Its fields are its keys in the recipe, and it checks them when it is made. Its `apply`
takes a module and returns one. Each step is a file in `steps/`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .last_words import Passages

# Name in recipes -> class. The file in steps/ has the step's name, with underscores.
_STEPS = {
    "drop-layers": "DropLayers",
    "skip-attention": "SkipAttention",
    "prune-magnitude": "PruneMagnitude",
    "prune-structured": "PruneStructured",
    "low-rank": "LowRank",
    "share-weights": "ShareWeights",
    "distil": "Distil",
    "recover": "Recover",
    "quantization-aware": "QuantizationAware",
    "weights-int4": "WeightsInt4",
}


@dataclass(frozen=True)
class Workbench:
    """What steps work with beside the module.

    token_ids: of the text that decides what matters (calibration); tokenizer: the source's; source: folder of the
    uncompressed model, for a step that needs a teacher; checkpoints: the step's own folder, which outlives an
    interrupted run, made by whoever writes into it; say: takes one line about how far a long step is; before: settings
    of the steps that the model went through, those of the recipe before this one last; passages: of LAMBADA, which
    steps that train read now and then; rehearsal: whether a step that trains only finds out how long it would take, and
    changes no weights.
    """

    token_ids: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    source: Path
    checkpoints: Path
    context_length: int
    say: Callable[[str], None]
    before: tuple[dict[str, Any], ...] = ()
    passages: Passages | None = None
    rehearsal: bool = False


@dataclass(frozen=True)
class Applied:
    """What a step made: the module (the same one, or another), and what it chose, as plain data for the report."""

    module: PreTrainedModel
    details: dict[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """One step with its settings."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """Take a module in evaluation mode, float32, and return one. Raises: RecipeError where it cannot be done, in
        which case the module is as it was."""


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


@runtime_checkable
class Checked(Protocol):
    """A step that can be refused before any step runs."""

    def check(self, outlook: Outlook) -> None:
        """Note what the step does to the model that is looked ahead to. Raises: RecipeError, SourceError where it
        cannot be done whatever the steps before it choose."""


def step_names() -> list[str]:
    """Every step's name in recipes."""
    return list(_STEPS)


def step_class(name: str) -> Any:
    """The dataclass of a step. name: one of `step_names`."""
    return getattr(importlib.import_module(f".steps.{name.replace('-', '_')}", __package__), _STEPS[name])


def step_name(step: Step) -> str:
    """A step's name in recipes."""
    return next(name for name, class_name in _STEPS.items() if class_name == type(step).__name__)
