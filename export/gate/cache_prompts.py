"""The prompts that calibrate the scales of the INT8 cache, and other ones that judge them. They are the same each time.

A text contains few tokens of a vocabulary, and hardly any at its beginning, which attention treats in a special way. So
there are also prompts of special tokens, of random tokens, and the start of a chat. No prompt both calibrates and
judges. The judging prompts include the tokens with the most unusual embeddings that the others do not contain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...runtime.bundle import folder as names
from ...runtime.errors import TemplateError
from ...runtime.text.tokenizer import Tokenizer
from .judging import chat_template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_HELD_OUT_SHARE = 4  # this fraction of the text judges, the rest calibrates
# One long window of the text, since keys and values at later positions have other ranges. With windows of 256, the
# story model that comes with edgelm lost 0.16 nats at positions from 256 on, and 0.005 before.
_WINDOW, _SEEN_WINDOWS = 1024, 1
_JUDGED_WINDOW, _JUDGED_WINDOWS = 512, 1
_PIECE = 256
_RANDOM_PROMPTS, _RANDOM_TOKENS = 8, 16
_CALIBRATION_SEED, _JUDGING_SEED = 1, 2
_RARE_TOKENS, _RARE_PROMPT_TOKENS = 128, 32
_MOST_SPECIAL, _MOST_STARTS = 128, 8
_CHAT = ({"role": "user", "content": "Hello! Who are you?"},)


@dataclass(frozen=True)
class UnusualTokens:
    """Token ids that are rare in texts. special: the tokenizer's added tokens, the beginning-of-text token first;
    strange: all ids, the most unusual embeddings first; chat: the start of a chat, or empty."""

    special: tuple[int, ...]
    strange: tuple[int, ...]
    chat: tuple[int, ...]


@dataclass(frozen=True)
class CachePrompts:
    """calibrating: prompts that set the ranges; judging: pairs of a kind ("text", "random tokens", "special tokens",
    "rare tokens") and a prompt."""

    calibrating: tuple[list[int], ...]
    judging: tuple[tuple[str, list[int]], ...]


def unusual_tokens(
    tokenizer: PreTrainedTokenizerBase, bos: int | None, embedding: torch.Tensor, folder: Path
) -> UnusualTokens:
    """Find a model's unusual tokens. embedding: (vocab_size, hidden); folder: with the bundle's tokenizer and chat
    template.

    Cost: two passes over the embedding.
    """
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    special = sorted(added, key=lambda token: (token != bos, token))
    if bos is not None and bos not in added:
        special.insert(0, bos)
    return UnusualTokens(tuple(special[:_MOST_SPECIAL]), _by_strangeness(embedding), _chat_start(folder))


def cache_prompts(token_ids: Sequence[int], unusual: UnusualTokens, vocab_size: int, context: int) -> CachePrompts:
    """The prompts for a model, none longer than its context. token_ids: of the text.

    Cost: at most 1,024 tokens of the text and some 400 others to calibrate, 512 and some 500 others to judge.
    """
    cut = max(1, len(token_ids) - len(token_ids) // _HELD_OUT_SHARE)
    seen, held_out = list(token_ids[:cut]), list(token_ids[cut:])
    piece = min(_PIECE, context)
    starts = [[token, *seen[:4]][:context] for token in unusual.special[:_MOST_STARTS]]
    calibrating = [
        *_windows(seen, min(_WINDOW, context), _SEEN_WINDOWS),
        *starts,
        *_pieces(unusual.special, piece),
        *_pieces(unusual.chat, piece),
        *_random(vocab_size, context, _CALIBRATION_SEED),
    ]
    shown = {token for prompt in calibrating for token in prompt}
    rare = [token for token in unusual.strange if token not in shown]
    # The most unusual tokens, and as many others from the whole vocabulary.
    rest = rare[_RARE_TOKENS // 2 :]
    rare = rare[: _RARE_TOKENS // 2] + rest[:: 1 + 2 * len(rest) // _RARE_TOKENS]
    pairs = zip(reversed(unusual.special), _forever(held_out or seen), strict=False)
    mixed = [token for pair in pairs for token in pair]
    judging = {
        "text": _windows(held_out, min(_JUDGED_WINDOW, context), _JUDGED_WINDOWS),
        "random tokens": _random(vocab_size, context, _JUDGING_SEED),
        "special tokens": _pieces(mixed, piece),
        "rare tokens": _pieces(rare, min(_RARE_PROMPT_TOKENS, context)),
    }
    named = ((kind, prompt) for kind, found in judging.items() for prompt in found)
    return CachePrompts(tuple(calibrating), tuple(named))


def _by_strangeness(embedding: torch.Tensor) -> tuple[int, ...]:
    """Ids in turns from three rankings: the longest vectors, the shortest (tokens never seen in training), and those
    dominated by one component, which stay unusual behind a norm."""
    norms = embedding.norm(dim=1)
    largest = embedding.amax(dim=1).maximum(-embedding.amin(dim=1))
    ruled = largest / norms.clamp_min(1e-30)
    ranks = [order.argsort().tolist() for order in (-norms, norms, -ruled)]
    return tuple(dict.fromkeys(token for row in zip(*ranks, strict=True) for token in row))


def _chat_start(folder: Path) -> tuple[int, ...]:
    """The prompt of a short chat; empty without a chat template that works."""
    template = chat_template(folder)
    try:
        text = "" if template is None else template.prompt(_CHAT)
    except TemplateError:
        return ()
    return tuple(Tokenizer(folder / names.TOKENIZER_NAME).encode(text, special=False)) if text else ()


def _random(vocab_size: int, context: int, seed: int) -> list[list[int]]:
    size = (_RANDOM_PROMPTS, min(_RANDOM_TOKENS, context))
    prompts: list[list[int]] = np.random.default_rng(seed).integers(vocab_size, size=size).tolist()
    return prompts


def _windows(token_ids: Sequence[int], size: int, most: int) -> list[list[int]]:
    """Up to `most` pieces of a text, evenly spread."""
    pieces = _pieces(token_ids, size)
    return [pieces[index * len(pieces) // most] for index in range(most)] if len(pieces) > most else pieces


def _pieces(token_ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(token_ids[begin : begin + size]) for begin in range(0, len(token_ids), size)]


def _forever(token_ids: Sequence[int]) -> Iterator[int]:
    while True:
        yield from token_ids
