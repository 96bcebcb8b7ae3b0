"""Size and quality of a model after a step: bytes of its bundle, and one pass over a text in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...targets import Profile
from ..errors import RecipeError
from .reading import Reader
from .size import weight_bytes
from .step import Workbench
from .steps.weights_int4 import noted_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .vocabulary.trimmed import Trimmed

MOST_TOKENS = 2049  # of which the first is not predicted


@dataclass(frozen=True)
class Measuring:
    """What a compression measures. reads: quality on the text, before and after each step (False: sizes only);
    passages: LAMBADA file, whose first `count` passages are also measured (None: none)."""

    reads: bool = True
    passages: Path | None = None
    count: int = 100

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if self.count < 1:
            raise RecipeError(f"the number of passages must be 1 or more, found {self.count}")
        if self.passages is not None and not self.reads:
            raise RecipeError("passages cannot be measured if measuring is off: leave out --lambada or --no-measure")


EVERYTHING = Measuring()


@dataclass(frozen=True)
class Figures:
    """Figures of a model before quantization, compared with the source.

    parameters: shared ones count once; bytes: of the weights in the bundle; perplexity, kl, agreement_percent: on up to
    2,048 tokens of the text in windows of 512: perplexity, KL divergence from the source in nats a token, and share of
    positions where the most likely token is the source's; last_words_percent: accuracy on LAMBADA. None: not measured.
    """

    parameters: int
    bytes: int
    perplexity: float | None = None
    kl: float | None = None
    agreement_percent: float | None = None
    last_words_percent: float | None = None


class Meter:
    """Measures modules against the first one measured.

    Cost of each measurement: a forward pass over text and passages. Memory: see `Reader`.
    """

    def __init__(
        self, profile: Profile, token_ids: Sequence[int], context_length: int, trimmed: Trimmed | None, *, reads: bool
    ) -> None:
        """token_ids: the source's; trimmed: the tokens that steps leave of them (None: all); reads: whether quality is
        measured or only parameters and bytes."""
        self._profile, self._context = profile, context_length
        self._reader = Reader(token_ids[:MOST_TOKENS], context_length, trimmed) if reads else None

    def measure(self, module: PreTrainedModel, bench: Workbench) -> Figures:
        """Figures of a module in evaluation mode. bench: of the step before; its tokens are the module's, and its
        passages are measured. After `weights-int4`, quality is not measured: the module holds weights that are not
        rounded yet."""
        parameters, size = module.num_parameters(), weight_bytes(module, self._profile, self._context)
        if self._reader is None or noted_weights(module) is not None:
            return Figures(parameters, size)
        reading = self._reader.read(module, split=bench.trimmed is not None)
        words = None if bench.passages is None else 100 * bench.passages.accuracy(module)
        return Figures(parameters, size, reading.perplexity, reading.kl, 100 * reading.same, words)
