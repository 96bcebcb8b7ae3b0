"""`trim-vocabulary`: remove rare tokens, whose text is then written with two or more of the others.

In small models much of the weight is embedding: 21 % of the parameters of SmolLM2-135M, 63 % of Gemma 3 270M's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import RecipeError
from ..step import Applied, Outlook, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrimVocabulary:
    """ratio: share of the model's parameters to remove, in rows of the embedding and of a head of its own."""

    ratio: float

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`."""
        if outlook.steps:
            raise RecipeError("must be the first step, because all others work with the tokens that it leaves")

    def retokenized(self, module: PreTrainedModel, bench: Workbench) -> Workbench:
        """See `Retokenizing`."""
        from ..vocabulary.tokenizer import trim_tokenizer
        from ..vocabulary.trimmed import rows_of_tokens

        before = int(module.config.get_text_config().vocab_size)
        each = sum(weight.numel() for weight in rows_of_tokens(module)) / before
        rows = before - int(self.ratio * module.num_parameters() / each)
        trimmed = trim_tokenizer(bench.tokenizer, module, rows, bench.token_ids)
        passages = bench.passages and bench.passages.retokenized(trimmed.tokenizer, module)
        token_ids = trimmed.split(bench.token_ids)
        return replace(bench, token_ids=token_ids, tokenizer=trimmed.tokenizer, passages=passages, trimmed=trimmed)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: a few tokens are computed."""
        from ..vocabulary.trimmed import keep_rows

        assert bench.trimmed is not None, "the workbench of this step is made by `retokenized`"
        before, rows = module.num_parameters(), len(bench.trimmed.parts)
        keep_rows(module, bench.trimmed)
        after = len(bench.trimmed.kept)
        removed = round(100 * (1 - module.num_parameters() / before), 2)
        note = f"the vocabulary: {rows:,} -> {after:,} rows; removed tokens are written with several others"
        return Applied(module, {"removed_percent": removed, "rows": [rows, after], "note": note})
