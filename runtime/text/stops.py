"""Find stop strings in text that comes in pieces, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first stop string, and holds back only what may be the beginning of one.

    The first stop string is the one that is complete first; of several that are complete at the same place, the
    longest. So the result does not depend on the cuts. Cost of adding: the length of the piece and of the text held
    back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: texts of at least one character."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Add a piece. Returns the text that may be shown now. At a stop string, `stopped` is set, and nothing may be
        added."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back, if the text ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """The length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
