"""Passages of LAMBADA, which a module ends: how often it says the last word."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.folder import TOKENIZER_NAME
from ...runtime.errors import PromptError
from ...runtime.evaluation.quality import last_words, read_passages
from ...runtime.text.tokenizer import Tokenizer
from ..errors import RecipeError
from ..output.package import write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passages:
    """texts: one or more passages; tokenizer: as a bundle has it; context_length: of the model."""

    texts: tuple[str, ...]
    tokenizer: Tokenizer
    context_length: int

    def accuracy(self, module: torch.nn.Module) -> float:
        """The share of the passages, 0 to 1, whose last word a module in evaluation mode says. Cost: a pass over each.
        Raises: PromptError for a passage of one word."""
        from ..gate.torch_session import TorchSession
        from .progress import tracked

        passages = tracked(self.texts, "passages read")
        return last_words(TorchSession(module), self.tokenizer, passages, self.context_length).accuracy


def load_passages(
    path: Path, count: int, tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel, context_length: int
) -> Passages:
    """The first passages of a file of JSON lines. Raises: RecipeError where it cannot be read or has fewer."""
    texts = read_texts(path, count)
    with tempfile.TemporaryDirectory(prefix="edgelm-") as scratch:
        write_tokenizer(tokenizer, module, Path(scratch))
        return Passages(texts, Tokenizer(Path(scratch) / TOKENIZER_NAME), context_length)


def read_texts(path: Path, count: int) -> tuple[str, ...]:
    """As `load_passages`, the texts alone."""
    try:
        texts = read_passages(path)
    except PromptError as error:
        raise RecipeError(f"the passages to measure on: {error}") from error
    if len(texts) < count:
        raise RecipeError(f"{path} has {len(texts)} passages, fewer than the {count} asked for: lower --passages")
    return tuple(texts[:count])
