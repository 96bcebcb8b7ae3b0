"""What a request gives: chunks of a stream, a whole completion, what it cost. Plain data, immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Why an answer ended that came to its end, which is one that may be kept and given again.
CompleteReason = Literal["stop", "length", "context_full"]
FinishReason = Literal[CompleteReason, "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its natural log-probability under the model's own distribution, and the most likely tokens with
    theirs, the most likely one first. The chosen token is among them only where it is one of them."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stats:
    """What a request cost. Times in seconds, measured from the call; rates over the tokens after the first one.

    prompt_tokens: tokens of the prompt; reused_tokens: those of them that were not computed for it, but known;
    generated_tokens: tokens of the answer, an end token not counted; time_to_first_token_s: includes tokenization and
    waiting for another thread's request, and is the whole time where no token came before the deadline;
    decode_tokens_per_s: 0.0 where fewer than two tokens were computed; resident_bytes: physical memory of the process
    at the end; response_cache_hit: nothing was computed; guessed_tokens: draft tokens that were checked in a step
    beside others; accepted_tokens: those of them that came.
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
    """A piece of a stream: whole characters only, and nothing that may belong to a stop string.

    token_ids: the tokens that this piece completes. `finish_reason` and `stats` are set on the last chunk alone, whose
    text may be empty. logprobs: one for each of token_ids where they were asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    token_ids: of the answer without its end token; of an answer that a stop string ended, those whose text stands
    wholly in front of it. finish_reason: "stop" (the model, a stop string or the end of a schema ended it), "length"
    (max_tokens), "context_full" or "deadline" (the timeout). logprobs: one for each of token_ids where they were asked
    for, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None
