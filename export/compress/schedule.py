"""The keys that every step that trains has, and the text that it trains on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.host.files import read_text
from ..errors import RecipeError
from .steps import Applied, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 256


@dataclass(frozen=True)
class Schedule(ABC):
    """How long and on what a step trains.

    text: UTF-8 file, a relative path is one from the current folder (None: the text of the compression); steps: of the
    optimizer; batch: rows a step, over all processes; length: tokens a row (None: 256, or the model's context where
    that is shorter); learning_rate: AdamW's highest; warmup: share of the steps in which it rises from 0, before it
    falls along a cosine; seed: of the rows and of what is random in the model; checkpoint_every: steps.
    """

    text: str | None = None
    steps: int = 200
    batch: int = 8
    length: int | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.05
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        counts = {"steps": self.steps, "batch": self.batch, "checkpoint_every": self.checkpoint_every}
        for name, value in counts.items():
            if value < 1:
                raise RecipeError(f"{name} must be 1 or more, found {value}")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"length must be 2 or more, found {self.length}")
        if not 0 < self.learning_rate < float("inf"):
            raise RecipeError(f"learning_rate must be above 0, found {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise RecipeError(f"warmup is a share of the steps, 0 to 1, found {self.warmup}")
        if not 0 <= self.seed < 1 << 32:
            raise RecipeError(f"seed must be 0 to 4294967295, found {self.seed}")

    @abstractmethod
    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. What is trained is a copy: the module stays as it is."""

    def row_length(self, context_length: int) -> int:
        """Tokens a row. Raises: RecipeError where a row does not fit into the model's context."""
        if self.length is not None and self.length > context_length:
            raise RecipeError(f"length is {self.length}, but the model's context has {context_length} tokens")
        return self.length or min(_LENGTH, context_length)

    def read_tokens(self, bench: Workbench) -> list[int]:
        """The text as token ids; of special tokens there are those that the text writes out.

        Raises: RecipeError where it cannot be read or is too short for one row and the token after it.
        """
        ids = list(bench.token_ids) if self.text is None else bench.tokenizer(_read(self.text), **_PLAIN)["input_ids"]
        needed = self.row_length(bench.context_length) + 1
        if len(ids) < needed:
            raise RecipeError(
                f"{self.text or 'the text of the compression'} has {len(ids)} tokens, too few to train on: a row needs "
                f"{needed}. Name a longer file with text, or set a smaller length"
            )
        return ids


# As in the rest of a compression; and transformers need not warn of a text longer than the context.
_PLAIN = {"add_special_tokens": False, "verbose": False}


def _read(text: str) -> str:
    try:
        return read_text(Path(text))
    except OSError as error:
        raise RecipeError(f"text = {text!r} cannot be read ({error.strerror}) from {Path.cwd()}") from error
