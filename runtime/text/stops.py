"""Stop strings in text that comes in pieces: never shown, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, holding back only what may be the beginning of one.

    The first stop string is the one that is complete first, and the longest of those that are complete at once. So the
    result does not depend on how the text was cut. Adding costs the length of the piece and of what was held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: texts of at least one character."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What may be shown now. Where that ends at a stop string, `stopped` is set, and nothing may be added."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, for a text that ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
