"""One text that is decoded: its prompt, how tokens are chosen, when it ends, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .prompt_lookup import Lookup
from .sampling import require_numbers


class Chooser(Protocol):
    """Chooses tokens from logits. It is called once for each token of an answer, in order, so it may keep state."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. logits: (vocab_size) float32, valid during the call; do not change them."""


class Greedy:
    """Chooses the most likely token, the lowest id among equals."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Raises: SessionError for logits that are NaN or infinite."""
        best = int(logits.argmax())
        require_numbers(logits[best])
        return best


def never() -> bool:
    """For a text that nothing interrupts."""
    return False


def no_deadline() -> float | None:
    """For a text without a deadline."""
    return None


@dataclass(eq=False)
class Row:
    """One text in a `Decoder`.

    It ends after `max_tokens`; after a token of `stop_ids`, which is its last one; before its next token once `ended`
    is set; or between two steps once `interrupted()` is true. seconds_left: until the deadline, None without one. keep:
    None if the text ends when the context is full (max_tokens then fits into it). Otherwise a full context slides: the
    older half of what follows the first `keep` tokens is forgotten, and the rest is fed again, so the text continues
    exactly as after those tokens in a fresh run. lookup: draft tokens.
    """

    token_ids: Sequence[int]
    max_tokens: int
    chooser: Chooser
    stop_ids: Collection[int] = ()
    interrupted: Callable[[], bool] = never
    seconds_left: Callable[[], float | None] = no_deadline
    keep: int | None = None
    lookup: Lookup | None = None
    ended: bool = False
    # All tokens of the text; how many of them are in the KV cache; how many of the prompt were there before; how many
    # were chosen.
    known: list[int] = field(init=False)
    fed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    chosen: int = field(default=0, init=False)
    # How often a shorter prompt was fed first.
    passed_over: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.known = list(self.token_ids)

    @property
    def greedy(self) -> bool:
        """Whether a session that picks tokens may pick them for this row."""
        return type(self.chooser) is Greedy

    def is_over(self) -> bool:
        """Whether the last token was the last one."""
        return self.ended or self.known[-1] in self.stop_ids or self.chosen == self.max_tokens

    def shorten(self) -> None:
        """Forget the older half of what follows the first `keep` tokens; at least two must follow them."""
        assert self.keep is not None, "asked before"
        self.known = shortened(self.known, self.keep)
        self.fed = self.keep


def shortened(token_ids: Sequence[int], keep: int) -> list[int]:
    """The ids without the older half of those that follow the first `keep`; at least two must follow them."""
    dropped = (len(token_ids) - keep) // 2
    return [*token_ids[:keep], *token_ids[keep + dropped :]]
