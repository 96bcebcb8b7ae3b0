"""Text that a model writes itself, to train a smaller one on: half of it chats, half of it anything.

A chat begins as the model's chat template begins one, so the model writes the question, too (Xu et al., Magpie, arXiv
2406.08464). Anything begins with a token of a text that is at hand (Liu et al., LLM-QAT, arXiv 2305.17888). Tokens are
drawn as the model predicts them: to such text its own predictions are what a smaller model must learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..progress import tracked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 32  # that are written at a time
_CONTENT = "\x00"  # stands for what a user says


def write_own_text(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[int],
    tokens: int,
    length: int,
) -> list[int]:
    """So many tokens or more, in passages of `length` one after the other.

    module: in evaluation mode; starts: tokens that passages begin with. The same arguments give the same text on the
    same machine. Cost: a pass for each token, of 32 passages at a time.
    """
    opening = chat_opening(tokenizer)
    written: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for turn in tracked(range(-(-tokens // (_ROWS * length))), "times 32 passages written"):
            prompts = [[starts[index]] for index in torch.randint(len(starts), (_ROWS,)).tolist()]
            if opening is not None and turn % 2 == 0:
                prompts = [opening] * _ROWS
            written += _write(module, torch.tensor(prompts), length).flatten().tolist()
    return written


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens of a chat up to what its user says, or None where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        return None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": _CONTENT}], tokenize=False)
    ids: list[int] = tokenizer(str(chat).partition(_CONTENT)[0], add_special_tokens=False)["input_ids"]
    return ids or None


def _write(module: PreTrainedModel, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (rows, length), each its prompt and what the model draws after it; an end of text ends none."""
    ids, cache, fed = prompts, None, prompts
    with torch.no_grad():
        while ids.shape[1] < length:
            result: Any = module(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            fed = torch.multinomial(torch.softmax(result.logits[:, -1].float(), -1), 1)
            ids = torch.cat([ids, fed], dim=1)
    return ids
