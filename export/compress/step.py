"""The step protocol and the list of steps.

A step is a frozen dataclass in a file of `steps/`. Its fields are its keys in the recipe; the constructor checks them.
`apply` takes a module and returns one.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .last_words import Passages
    from .vocabulary.trimmed import Trimmed

# Name in recipes -> class, in the file of steps/ that has the step's name with underscores.
_STEPS = {
    "trim-vocabulary": "TrimVocabulary",
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
    """What a step needs beside the module.

    token_ids: calibration text; tokenizer: the model's; source: folder of the uncompressed model, see `reference`;
    checkpoints: this step's folder, kept after an interruption and created by its first writer; context_length: the
    model's, in tokens; say: receives progress lines; before: settings of the steps before this one, oldest first;
    passages: LAMBADA passages that training steps evaluate on; rehearsal: a dry run, in which a training step only
    estimates its time and changes no weights; trimmed: the source's tokens that remain, if the recipe removes some.
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
    trimmed: Trimmed | None = None

    def reference(self) -> torch.nn.Module:
        """The uncompressed model, which training compares with: the default teacher. It reads and predicts the tokens
        that remain. Raises: SourceError."""
        from ..source.loading import load_module
        from .vocabulary.trimmed import InRemaining

        module = load_module(self.source)
        return module if self.trimmed is None else InRemaining(module, self.trimmed)


@dataclass(frozen=True)
class Applied:
    """Result of a step. module: the same or a new one; details: the step's choices, as plain data for the report."""

    module: PreTrainedModel
    details: dict[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """One step with its settings."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """Take a float32 module in evaluation mode and return one. Raises: RecipeError if the step does not fit the
        module, which then stays unchanged."""


@dataclass
class Parts:
    """Layers or attention sublayers that remain after the steps checked so far.

    left: indexes that may remain; count: how many remain. count is smaller than len(left) after a step that names no
    indexes, because its choice is not known yet.
    """

    left: list[int]
    count: int

    def drop(self, choose: Callable[[Collection[int]], list[int]], *, named: bool) -> None:
        """Remove what a step chooses. choose: returns the step's choice among the given indexes; named: whether the
        recipe names the indexes."""
        gone = choose(self.left if named else self.left[: self.count])
        if named:
            self.left = [index for index in self.left if index not in gone]
        self.count = min(self.count - len(gone), len(self.left))

    def bound(self, others: Parts) -> None:
        """Limit these parts to those inside `others`, such as attention sublayers to the remaining layers."""
        self.left = [index for index in self.left if index in others.left]
        self.count = min(self.count, others.count, len(self.left))


@dataclass
class Outlook:
    """The source model, and what the steps before the checked one are known to remove.

    bench: workbench of the checked step; steps: number of steps before it.
    """

    module: PreTrainedModel
    bench: Workbench
    steps: int = 0
    _parts: dict[str, Parts] = field(default_factory=dict)

    def parts(self, kind: str, find: Callable[[PreTrainedModel], Collection[int]]) -> Parts:
        """Remaining parts of a kind. find: returns the indexes in the source model."""
        if kind not in self._parts:
            found = sorted(find(self.module))
            self._parts[kind] = Parts(found, len(found))
        return self._parts[kind]


@runtime_checkable
class Checked(Protocol):
    """A step that can be checked before any step runs."""

    def check(self, outlook: Outlook) -> None:
        """Record in `outlook` what the step removes. Raises: RecipeError, SourceError if the step cannot work whatever
        the steps before it choose."""


@runtime_checkable
class Retokenizing(Protocol):
    """A first step that changes the tokenizer. The whole recipe works with the tokens that it leaves."""

    def retokenized(self, module: PreTrainedModel, bench: Workbench) -> Workbench:
        """The workbench with the new tokenizer. module: the source. Raises: RecipeError if the tokenizer cannot be
        changed so."""


def step_names() -> list[str]:
    """Names of all steps, as recipes write them."""
    return list(_STEPS)


def step_class(name: str) -> Any:
    """The dataclass of a step. name: one of `step_names`."""
    return getattr(importlib.import_module(f".steps.{name.replace('-', '_')}", __package__), _STEPS[name])


def step_name(step: Step) -> str:
    """Name of a step, as recipes write it."""
    return next(name for name, class_name in _STEPS.items() if class_name == type(step).__name__)
