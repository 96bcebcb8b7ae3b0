"""Keys of all training steps, and their training and held-out texts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ....runtime.host.files import read_text
from ...errors import RecipeError
from ..processes import count_processes
from ..step import Applied, Outlook, Workbench
from .precision import Precision, fastest
from .texts import TrainingTexts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


Keep = Literal["loss", "kl", "last"]

_LENGTH = 256
_HELD_OUT_TOKENS = 2049  # of which the first is not predicted
_TENTH = 10


@dataclass(frozen=True)
class Schedule(ABC):
    """Settings of a training.

    text: UTF-8 file, relative to the current folder (None: the calibration text); steps: optimizer steps; batch: rows a
    step, over all processes; length: tokens a row (None: 256, or the context length if that is shorter); learning_rate:
    AdamW's maximum; warmup: share of the steps in which the rate rises from 0 before its cosine decay; seed: of the
    rows and of randomness in the model; checkpoint_every: steps between checkpoints.

    held_out: UTF-8 file to evaluate on (None: the last tenth of the text, which is then not trained on; nothing if that
    is shorter than a row); evaluate_every: steps between evaluations (None: a tenth of `steps`); keep: weights to keep,
    those of the lowest held-out "loss", of the lowest KL divergence from the source ("kl"), or the "last" (None: the
    step's default); patience: consecutive evaluations without improvement before the training stops early (None:
    never); samples: number of held-out passages that source and model continue, for the report; precision: of the
    matrix products in training (None: the fastest of the device); evaluations compute in float32.
    """

    KEEPS: ClassVar[Keep] = "loss"

    text: str | None = None
    steps: int = 200
    batch: int = 8
    length: int | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.05
    seed: int = 0
    checkpoint_every: int = 50
    held_out: str | None = None
    evaluate_every: int | None = None
    keep: Keep | None = None
    patience: int | None = None
    samples: int = 3
    precision: Precision | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        for name in ("steps", "batch", "checkpoint_every", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be 1 or more, found {value}")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"length must be 2 or more, found {self.length}")
        if not 0 < self.learning_rate < float("inf"):
            raise RecipeError(f"learning_rate must be above 0, found {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise RecipeError(f"warmup is a share of the steps, 0 to 1, found {self.warmup}")
        if not 0 <= self.seed < 1 << 32:
            raise RecipeError(f"seed must be 0 to 4294967295, found {self.seed}")
        if self.samples < 0:
            raise RecipeError(f"samples must be 0 or more, found {self.samples}")
        if self.keep == "last" and self.patience is not None:
            raise RecipeError('patience has no effect with keep = "last": leave one of them out')

    @abstractmethod
    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Trains a copy; the module stays unchanged."""

    def row_length(self, context_length: int) -> int:
        """Tokens a row. Raises: RecipeError if a row exceeds the model's context."""
        if self.length is not None and self.length > context_length:
            raise RecipeError(f"length is {self.length}, but the model's context has {context_length} tokens")
        return self.length or min(_LENGTH, context_length)

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. Checks the texts, and that an existing checkpoint belongs to this step."""
        from .checkpoint import check_ahead

        self.require_shares(count_processes())
        check_ahead(self, self.read_texts(outlook.bench), outlook.bench)

    def require_shares(self, processes: int) -> None:
        """Raise RecipeError unless the batch is a multiple of the number of processes."""
        if self.batch % processes:
            raise RecipeError(
                f"batch is {self.batch}, which {processes} processes cannot share: use a multiple of {processes}"
            )

    def read_texts(self, bench: Workbench) -> TrainingTexts:
        """Token ids of training and held-out text. No special tokens are added; those written in a text are parsed.

        Raises: RecipeError if a text cannot be read or is shorter than a row and the token after it.
        """
        needed = self.row_length(bench.context_length) + 1
        ids = list(bench.token_ids) if self.text is None else _ids(self.text, "text", bench)
        _require(ids, needed, self.text or "the calibration text", "train on", "text")
        if self.held_out is not None:
            held = _ids(self.held_out, "held_out", bench)[:_HELD_OUT_TOKENS]
            _require(held, needed, self.held_out, "evaluate on", "held_out")
            return TrainingTexts(ids, held, self.held_out)
        tail = min(len(ids) // _TENTH, _HELD_OUT_TOKENS)
        if tail < needed:
            return TrainingTexts(ids, [], "")
        return TrainingTexts(ids[:-tail], ids[-tail:], f"the end of {self.text or 'the calibration text'}")

    def due(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps."""
        every = self.evaluate_every or math.ceil(self.steps / _TENTH)
        return done % every == 0 or done == self.steps

    def precision_on(self, device: torch.device) -> Precision:
        """Precision of the training's matrix products on a device."""
        return self.precision or fastest(device)

    @property
    def kept(self) -> Keep:
        """Which weights are kept."""
        return self.keep or self.KEEPS


def _ids(path: str, key: str, bench: Workbench) -> list[int]:
    ids: list[int] = bench.tokenizer(_read(path, key), **_PLAIN)["input_ids"]
    return ids


def _require(ids: list[int], needed: int, what: str, aim: str, key: str) -> None:
    if len(ids) < needed:
        raise RecipeError(
            f"{what} has {len(ids)} tokens, too few to {aim}: a row needs {needed}. Set {key} to a longer file, or "
            "length to fewer tokens"
        )


# No special tokens, as in the rest of a compression; no warning of transformers about texts longer than the context.
_PLAIN = {"add_special_tokens": False, "verbose": False}


def _read(text: str, key: str) -> str:
    try:
        return read_text(Path(text))
    except OSError as error:
        raise RecipeError(f"{key} = {text!r} cannot be read ({error.strerror}) from {Path.cwd()}") from error
