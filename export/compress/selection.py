"""Which layers a step means: the last n, those named, or the n least useful. One rule for all steps that choose."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..errors import RecipeError


@dataclass(frozen=True)
class Selection:
    """The keys of a step that chooses. last: the last n; layers: these; least_useful: the n of least influence. One of
    the three."""

    last: int | None = None
    layers: tuple[int, ...] | None = None
    least_useful: int | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        keys = {"last": self.last, "layers": self.layers, "least-useful": self.least_useful}
        given = [name for name, value in keys.items() if value is not None]
        if len(given) != 1:
            raise RecipeError(f"give one of last, layers and least-useful, found {', '.join(given) or 'none'}")
        if self._count < 1:
            raise RecipeError(f"{given[0]} takes one layer or more")
        if len(set(self.layers or ())) < len(self.layers or ()):
            raise RecipeError(f"layers names a layer twice: {list(self.layers or ())}")

    @property
    def _count(self) -> int:
        return len(self.layers) if self.layers is not None else self.last or self.least_useful or 0

    def choose(
        self, there: Collection[int], what: str, influence: Callable[[], dict[int, float]]
    ) -> tuple[list[int], dict[int, float]]:
        """The chosen indexes, sorted, and the influences, where these were asked.

        there: indexes that can be chosen; what: they are, for messages. Raises: RecipeError where an index is not there
        or nothing would be left.
        """
        order = sorted(there)
        missing = sorted(set(self.layers or ()) - set(order))
        if missing:
            raise RecipeError(f"there is no {what} {missing[0]}: there are {', '.join(map(str, order))}")
        if self._count >= len(order):
            raise RecipeError(f"of {len(order)} {what}s at most {len(order) - 1} can go, not {self._count}")
        if self.layers is not None:
            return sorted(self.layers), {}
        if self.last is not None:
            return order[-self.last :], {}
        found = influence()
        return sorted(sorted(order, key=lambda index: found[index])[: self._count]), found
