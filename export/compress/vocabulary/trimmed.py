"""The remaining tokens of a model, the rows that belong to them, and the source's predictions in these tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TINY = 1e-30  # probability, in place of 0
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # in a generation configuration, beside the keys `*_token_id`


@dataclass(frozen=True)
class Trimmed:
    """tokenizer: the smaller one; kept: the source's id of each of its ids, ascending; parts: for each of the source's
    rows, the ids of the same characters (empty for a row without a token)."""

    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]

    def split(self, token_ids: Iterable[int]) -> list[int]:
        """Ids of the same text. The smaller tokenizer may cut a few words of it otherwise: a merge that stayed may join
        what a removed one joined before."""
        return [part for token in token_ids for part in self.parts[token]]

    def spoken(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Log probabilities (..., remaining tokens) of (..., the source's tokens): a removed token counts as its first
        part."""
        known, firsts = (tensor.to(probabilities.device) for tensor in self._first_parts)
        found = probabilities.new_zeros(*probabilities.shape[:-1], len(self.kept))
        found.index_add_(-1, firsts, probabilities * known)
        return (found / found.sum(-1, keepdim=True)).clamp_min(_TINY).log()

    @cached_property
    def _first_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each of the source's rows, whether it has a token, and the first id of its parts."""
        known = torch.tensor([bool(parts) for parts in self.parts])
        return known, torch.tensor([parts[0] if parts else 0 for parts in self.parts])


def keep_rows(module: PreTrainedModel, trimmed: Trimmed) -> None:
    """Remove, in place, the embedding's and the head's rows of removed tokens, and renumber the token ids in the
    model's configuration.

    module: in evaluation mode. Raises: RecipeError if the model uses token ids in another place too; the module is
    unusable then.
    """
    kept = torch.tensor(trimmed.kept)
    probe = torch.linspace(0, len(kept) - 1, 16).long()[None]  # up to the last, which is most often renumbered
    with torch.no_grad():
        expected = module(input_ids=kept[probe], use_cache=False).logits[..., kept]
        for weight in rows_of_tokens(module):
            weight[: len(kept)] = weight[kept]
        module.resize_token_embeddings(len(kept), mean_resizing=False)
        found = module(input_ids=probe, use_cache=False).logits
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise RecipeError(
            f"{type(module).__name__} uses token ids outside of its embedding and head: remove the step trim-vocabulary"
        )
    new = {old: index for index, old in enumerate(trimmed.kept)}
    for config in configs(module):
        for key, value in _id_settings(config):
            # An id without a row, such as -1, stays.
            setattr(config, key, new.get(value, value) if isinstance(value, int) else [new.get(i, i) for i in value])


class InRemaining(torch.nn.Module):
    """The source, reading and predicting the remaining tokens. It loses none of its knowledge of removed tokens: their
    probability is that of their first part. Logits are log probabilities."""

    def __init__(self, source: PreTrainedModel, trimmed: Trimmed) -> None:
        super().__init__()
        self.source, self.trimmed = source, trimmed

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        """As the source's."""
        kept = torch.tensor(self.trimmed.kept, device=input_ids.device)
        result: Any = self.source(input_ids=kept[input_ids], **others)
        result.logits = self.trimmed.spoken(torch.softmax(result.logits.float(), -1))
        return result


def rows_of_tokens(module: Any) -> list[torch.Tensor]:
    """Weights with a row for each token, each once: embedding, head and the head's bias."""
    head = module.get_output_embeddings()
    weights = [module.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return list({id(weight): weight.detach() for weight in weights if weight is not None}.values())


def configs(module: PreTrainedModel) -> list[Any]:
    """The configurations that may name token ids, each once."""
    found = (module.config, module.config.get_text_config(), module.generation_config)
    return list({id(config): config for config in found if config is not None}.values())


def _id_settings(config: Any) -> list[tuple[str, int | Sequence[int]]]:
    """Settings of a configuration that are a token id or a list of them."""
    names = [name for name in vars(config) if name.endswith("_token_id") or name in _ID_LISTS]
    return [(name, getattr(config, name)) for name in names if isinstance(getattr(config, name), (int, list))]


def named_ids(config: Any) -> set[int]:
    """The token ids that a configuration names."""
    return {each for _, value in _id_settings(config) for each in ([value] if isinstance(value, int) else value)}
