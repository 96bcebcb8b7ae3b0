"""Which prompt is fed next, and how many of its tokens at once (chunked prefill)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .row import Row

# A prompt that was overtaken so often is fed next, however long it is.
_MOST_OVERTAKINGS = 4
# The smallest piece near a deadline, and the first piece, while the speed is unknown.
_LEAST_PIECE, _FIRST_PIECE = 16, 64
# Tokens fed between two steps of other rows, whose readers wait meanwhile.
_PIECE_BESIDE_ROWS = 256
# Fixed cost of a piece, in tokens: each run reads all weights.
_COST_OF_A_RUN = 32


class Pieces:
    """Chooses pieces, and remembers how fast prompts are fed, so that a piece ends before its row's deadline."""

    def __init__(self, most: int, bounded: bool) -> None:
        """most: tokens at once; bounded: shorten pieces where a row's deadline is near."""
        self._most, self._bounded = most, bounded
        self._tokens_per_s: float | None = None

    def budget(self, beside_rows: bool) -> int:
        """Tokens that may be fed in one step."""
        return min(self._most, _PIECE_BESIDE_ROWS) if beside_rows else self._most

    def cost(self, tokens: int) -> int:
        """What a piece takes of the budget, in tokens."""
        return max(tokens, _COST_OF_A_RUN)

    def choose(self, rows: Sequence[Row], begin: int) -> int:
        """The index of the row, from `begin` on, with the shortest rest of its prompt, or of one that was overtaken too
        often."""
        rest = {index: len(rows[index].known) - rows[index].fed for index in range(begin, len(rows))}
        chosen = min(rest, key=lambda index: (rows[index].passed_over < _MOST_OVERTAKINGS, rest[index]))
        for index, left in rest.items():
            if index != chosen and left > rest[chosen]:
                rows[index].passed_over += 1
        return chosen

    def size(self, row: Row, budget: int) -> int:
        """How many tokens of a row to feed at once."""
        most = min(budget, len(row.known) - row.fed)
        left = row.seconds_left() if self._bounded else None
        if left is None:
            return most
        # The product is infinite for a timeout near the largest float.
        fits = _FIRST_PIECE if self._tokens_per_s is None else min(most, left * self._tokens_per_s)
        return min(most, max(_LEAST_PIECE, int(fits)))

    def fed(self, tokens: int, started: float) -> None:
        """Note that a piece was fed. started: when it began, by `time.perf_counter`."""
        if tokens >= _LEAST_PIECE:
            self._tokens_per_s = tokens / max(1e-9, time.perf_counter() - started)
