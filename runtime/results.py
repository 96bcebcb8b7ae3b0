"""Results of a request: chunks of a stream, a whole completion, figures. Plain data, immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Reasons with which an answer is complete, so that it may be kept and returned again.
CompleteReason = Literal["stop", "length", "context_full"]
FinishReason = Literal[CompleteReason, "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its natural log-probability under the model's own distribution, and the most likely tokens with
    theirs, the most likely one first. The chosen token is among those only if it is one of the most likely."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stats:
    """Figures of a request. Times in seconds, measured from the call; rates over the tokens after the first one.

    prompt_tokens: tokens of the prompt; reused_tokens: those that were found in a cache, not computed;
    generated_tokens: tokens of the answer, without an end token; time_to_first_token_s: includes tokenization and
    waiting for other requests, and is the whole time if no token came before the deadline; decode_tokens_per_s: 0.0 if
    fewer than two tokens were computed; resident_bytes: physical memory of the process at the end; response_cache_hit:
    nothing was computed; guessed_tokens: draft tokens that were verified; accepted_tokens: draft tokens that were
    accepted.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    time_to_first_token_s: float
    decode_tokens_per_s: float
    resident_bytes: int
    response_cache_hit: bool
    guessed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: whole characters only, and no text that may belong to a stop string.

    token_ids: the tokens that end within this piece. `finish_reason` and `stats` are set on the last chunk only, whose
    text may be empty. logprobs: one for each of token_ids if asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    token_ids: without the end token; if a stop string ended the answer, the tokens whose text is wholly in front of it.
    finish_reason: "stop" (the model, a stop string or the end of a schema ended it), "length" (max_tokens),
    "context_full" or "deadline" (the timeout). logprobs: one for each of token_ids if asked for, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None
