"""Measure a session: prefill and decode speed. Used by `edgelm bench`, and at export for the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..sessions.protocol import Session


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
    prefills, decodes = [], []
    for _ in range(repeats + 1):
        prefills.append(time_prompt(session, token_ids))
        decodes += [time_step(session, token_ids) for _ in range(steps)]
    session.rewind(0)
    return Speed(len(token_ids), statistics.median(prefills[1:]), statistics.median(decodes[steps:]))


def time_prompt(session: Session, token_ids: Sequence[int]) -> float:
    """Feed a prompt in pieces, after emptying the session. Returns seconds."""
    session.rewind(0)
    started = time.perf_counter()
    piece = session.capabilities.piece_tokens
    for begin in range(0, len(token_ids), piece):
        _step(session, token_ids[begin : begin + piece])
    return time.perf_counter() - started


def time_step(session: Session, token_ids: Sequence[int]) -> float:
    """Decode one token directly behind the prompt that `time_prompt` fed. Returns seconds."""
    # A recurrent model cannot rewind, but its steps cost the same at any length.
    if session.can_rewind(len(token_ids)):
        session.rewind(len(token_ids))
    started = time.perf_counter()
    _step(session, token_ids[-1:])
    return time.perf_counter() - started


def _step(session: Session, token_ids: Sequence[int]) -> None:
    picks = session.capabilities.picks
    if picks is not None:
        picks.likeliest(token_ids)
    else:
        session.step(token_ids)
