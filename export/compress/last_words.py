"""Accuracy of a module on the last words of LAMBADA passages."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.folder import TOKENIZER_NAME
from ...runtime.errors import PromptError
from ...runtime.evaluation.quality import last_words, read_passages
from ...runtime.text.tokenizer import Tokenizer
from ..errors import RecipeError
from ..source.tokenizer_files import write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passages:
    """texts: one or more passages; tokenizer: the runtime's; context_length: the model's, in tokens."""

    texts: tuple[str, ...]
    tokenizer: Tokenizer
    context_length: int

    def first(self, count: int) -> Passages:
        """At most the first `count` passages."""
        return dataclasses.replace(self, texts=self.texts[:count])

    def retokenized(self, tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel) -> Passages:
        """The same passages with another tokenizer of transformers."""
        return dataclasses.replace(self, tokenizer=_of_runtime(tokenizer, module))

    def accuracy(self, module: torch.nn.Module) -> float:
        """Share of the passages, 0 to 1, whose last word the module predicts.

        module: in evaluation mode. Cost: one forward pass per passage. Raises: PromptError for a passage of one word.
        """
        from ..gate.torch_session import TorchSession
        from .progress import tracked

        passages = tracked(self.texts, "passages read")
        return last_words(TorchSession(module), self.tokenizer, passages, self.context_length).accuracy


def load_passages(
    path: Path, count: int, tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel, context_length: int
) -> Passages:
    """The first `count` passages of a JSON Lines file. Raises: RecipeError if it cannot be read or has fewer."""
    return Passages(read_texts(path, count), _of_runtime(tokenizer, module), context_length)


def _of_runtime(tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel) -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="edgelm-") as scratch:
        write_tokenizer(tokenizer, module, Path(scratch))
        return Tokenizer(Path(scratch) / TOKENIZER_NAME)


def read_texts(path: Path, count: int) -> tuple[str, ...]:
    """The texts of `load_passages`. Raises: RecipeError."""
    try:
        texts = read_passages(path)
    except PromptError as error:
        raise RecipeError(f"the LAMBADA passages: {error}") from error
    if len(texts) < count:
        raise RecipeError(f"{path} has {len(texts)} passages, fewer than the {count} asked for: lower --passages")
    return tuple(texts[:count])
