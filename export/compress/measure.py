"""What a step cost and what it bought: one pass over a text in torch, and the size that its bundle will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...targets import Profile
from ..errors import RecipeError
from .last_words import Passages
from .reading import Reader
from .size import weight_bytes
from .steps.weights_int4 import noted_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 2049  # of which the first is not predicted


@dataclass(frozen=True)
class Measuring:
    """What a compression measures. reads: the text, before and after each step, or nothing; passages: file of LAMBADA's
    passages, of which the first `count` are read as well (None: none)."""

    reads: bool = True
    passages: Path | None = None
    count: int = 100

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if self.count < 1:
            raise RecipeError(f"the number of passages must be 1 or more, found {self.count}")
        if self.passages is not None and not self.reads:
            raise RecipeError("passages cannot be read where nothing is measured: leave one of the two out")


EVERYTHING = Measuring()


@dataclass(frozen=True)
class Figures:
    """A model before it is rounded to INT8, beside the source.

    parameters: each shared one once; bytes: of the weights in the bundle; perplexity, kl, agreement_percent: of up to
    2,048 tokens of the text in windows of 512: the perplexity, the divergence from the source in nats a token, and the
    share of positions where the most likely token is the source's; last_words_percent: accuracy on LAMBADA's passages.
    None is what was not measured.
    """

    parameters: int
    bytes: int
    perplexity: float | None = None
    kl: float | None = None
    agreement_percent: float | None = None
    last_words_percent: float | None = None


class Meter:
    """Measures one module after another against the first one.

    Cost, each time: a pass over the text, and over the passages; memory for what the first module said to the text.
    """

    def __init__(
        self, profile: Profile, token_ids: Sequence[int], context_length: int, passages: Passages | None, *, reads: bool
    ) -> None:
        """passages: of LAMBADA, if they are to be read; reads: whether anything is, or parameters and bytes are all."""
        self._profile, self._context = profile, context_length
        self._reader = Reader(token_ids[:MOST_TOKENS], context_length) if reads else None
        self._passages = passages

    def measure(self, module: PreTrainedModel) -> Figures:
        """Of a module in evaluation mode. Weights that will have 4 bits are not what the module holds: it is not
        read."""
        parameters, size = module.num_parameters(), weight_bytes(module, self._profile, self._context)
        if self._reader is None or noted_weights(module) is not None:
            return Figures(parameters, size)
        reading = self._reader.read(module)
        words = None if self._passages is None else 100 * self._passages.accuracy(module)
        return Figures(parameters, size, reading.perplexity, reading.kl, 100 * reading.same, words)
