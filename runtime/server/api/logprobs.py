"""Log-probabilities in the shapes of chat and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...results import TokenLogprob
from ...text.tokenizer import Tokenizer


def chat_entries(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat's choice."""
    return [
        {
            **_entry(tokenizer, item.token_id, item.logprob),
            "top_logprobs": [_entry(tokenizer, token, value) for token, value in item.top],
        }
        for item in found
    ]


def completion_entries(tokenizer: Tokenizer, found: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice. offset: where its text begins in the whole text, in characters."""
    tokens = [_text(tokenizer, item.token_id) for item in found]
    offsets, place = [], offset
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in found],
        "top_logprobs": [{_text(tokenizer, token): value for token, value in item.top} for item in found],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": _text(tokenizer, token), "logprob": value, "bytes": list(data)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text. For a token without text, such as an end token: its name in the vocabulary."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace") or tokenizer.token(token)
