"""Which layers a step means: the last ones, those named, or the least useful. One rule for all steps that choose."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import RecipeError

if TYPE_CHECKING:
    from ..step import Parts


@dataclass(frozen=True)
class Selection:
    """The keys of a step that chooses. last: so many last ones; layers: these; least_useful: so many that
    the answers miss least. One of the three. How many is a whole number, or a share between 0 and 1 of those there are.
    """

    last: float | None = None
    layers: tuple[int, ...] | None = None
    least_useful: float | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        keys = {"last": self.last, "layers": self.layers, "least_useful": self.least_useful}
        given = [name for name, value in keys.items() if value is not None]
        if len(given) != 1:
            raise RecipeError(f"give one of last, layers and least_useful, found {', '.join(given) or 'none'}")
        for name in ("last", "least_useful"):
            count = getattr(self, name)
            if count is not None and float(count).is_integer():
                object.__setattr__(self, name, int(count))  # as it was written, for records
            elif count is not None and not 0 < count < 1:
                raise RecipeError(f"{given[0]} takes a whole number or a share between 0 and 1, found {count:g}")
        counts = [count for count in (self.last, self.least_useful) if count is not None]
        if self.layers == () or any(count <= 0 for count in counts):
            raise RecipeError(f"{given[0]} takes one layer or more")
        if len(set(self.layers or ())) < len(self.layers or ()):
            raise RecipeError(f"layers names a layer twice: {list(self.layers or ())}")

    def _count(self, there: int) -> int:
        """How many of so many layers are meant: of a share, the nearest number, and at least one."""
        if self.layers is not None:
            return len(self.layers)
        given = self.last if self.last is not None else self.least_useful
        assert given is not None, "one of the three is given"
        return int(given) if given >= 1 else max(1, round(given * there))

    def check_parts(self, parts: Parts, what: str) -> None:
        """Look ahead, with nobody knowing yet which are least useful. Raises: as `choose`."""

        def choose(there: Collection[int]) -> list[int]:
            return self.choose(there, what, lambda count: dict.fromkeys(sorted(there)[:count], 0.0))[0]

        parts.drop(choose, named=self.layers is not None)

    def choose(
        self, there: Collection[int], what: str, least: Callable[[int], dict[int, float]]
    ) -> tuple[list[int], dict[int, float]]:
        """The chosen indexes, sorted, and what `least` measured, where it was asked.

        there: indexes that can be chosen; what: they are, for messages; least: so many least useful ones, each with
        what it measured. Raises: RecipeError where an index is not there or nothing would be left.
        """
        order = sorted(there)
        missing = sorted(set(self.layers or ()) - set(order))
        if missing:
            raise RecipeError(f"there is no {what} {missing[0]}: there are {', '.join(map(str, order))}")
        count = self._count(len(order))
        if count >= len(order):
            raise RecipeError(f"of {len(order)} {what}s at most {len(order) - 1} can go, not {count}")
        if self.layers is not None:
            return sorted(self.layers), {}
        if self.last is not None:
            return order[-count:], {}
        found = least(count)
        return sorted(found), found
