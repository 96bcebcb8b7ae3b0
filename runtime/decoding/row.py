"""One text that is decoded: its prompt, how its tokens are chosen, when it ends, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .prompt_lookup import Lookup
from .sampling import require_numbers


class Chooser(Protocol):
    """Chooses tokens from logits. It is asked once for each token of an answer, in their order, so it may remember."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. logits: (vocab_size) float32, valid during the call, not to be changed."""


class Greedy:
    """Chooses the most likely token, the lowest id among equals."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Raises: SessionError for logits that are NaN or infinite."""
        best = int(logits.argmax())
        require_numbers(logits[best])
        return best


def never() -> bool:
    """A text that nothing interrupts."""
    return False


def no_deadline() -> float | None:
    """A text that has as long as it takes."""
    return None


@dataclass(eq=False)
class Row:
    """One text in a `Decoder`.

    It ends after `max_tokens`, after a token of `stop_ids`, which counts as its last one, before its next token once
    `ended` was set, or between two steps once `interrupted()`. seconds_left: until it will be interrupted, None where
    that is not known. keep: None where nothing can follow a full context (max_tokens then fits into it). Otherwise,
    where the context is full, the older half of what follows the first `keep` tokens is forgotten and what remains is
    fed again: what follows is exactly what follows those tokens in a fresh run. lookup: draft tokens.
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
    # What the model is to know, how much of it is in the cache, how much of the prompt was in it before, and how many
    # tokens were chosen.
    known: list[int] = field(init=False)
    fed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    chosen: int = field(default=0, init=False)
    # How often a prompt that is shorter was fed first.
    passed_over: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.known = list(self.token_ids)

    @property
    def greedy(self) -> bool:
        """Whether a session that picks tokens may choose for it."""
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
