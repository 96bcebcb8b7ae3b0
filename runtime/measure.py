"""Measure a session: prefill and decode speed. Used by `edgelm bench`, and at export for the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .decode import PIECE_TOKENS, PicksTokens
from .session import Session


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats: prefill of `prompt_tokens` in seconds, one decode step on top of them in seconds."""

    prompt_tokens: int
    prefill_s: float
    step_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return 1 / self.step_s


def measure_speed(session: Session, token_ids: Sequence[int], steps: int = 32, repeats: int = 3) -> Speed:
    """Feed a prompt in pieces, then decode token by token on top of it. One run before the repeats is not counted.

    token_ids: the prompt; its values do not matter for speed. Leaves the session empty. A session that chooses tokens
    itself does so, as in greedy decoding.
    """
    step = session.likeliest if isinstance(session, PicksTokens) else session.step
    prefills, decodes = [], []
    for _ in range(repeats + 1):
        session.rewind(0)
        started = time.perf_counter()
        for begin in range(0, len(token_ids), PIECE_TOKENS):
            step(token_ids[begin : begin + PIECE_TOKENS])
        prefills.append(time.perf_counter() - started)
        for _ in range(steps):
            # A recurrence cannot go back, and its steps cost the same at any length.
            if session.can_rewind(len(token_ids)):
                session.rewind(len(token_ids))
            started = time.perf_counter()
            step(token_ids[-1:])
            decodes.append(time.perf_counter() - started)
    session.rewind(0)
    return Speed(len(token_ids), statistics.median(prefills[1:]), statistics.median(decodes[steps:]))
