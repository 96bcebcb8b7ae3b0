"""How steps choose layers or attention sublayers: the last ones, given indexes, or the least useful ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import RecipeError
from ..step import Applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..step import Parts

# Takes a number, and returns that many of the least useful indexes, each with its measured KL.
Least = Callable[[int], dict[int, float]]


@dataclass(frozen=True)
class Selection:
    """Keys of a step that chooses; exactly one is given.

    last: number of last ones; layers: indexes; least_useful: number of those whose removal changes the predictions
    least. A number is a whole number, or a share between 0 and 1 of the layers or sublayers present.
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
                object.__setattr__(self, name, int(count))  # records show 2, not 2.0
            elif count is not None and not 0 < count < 1:
                raise RecipeError(f"{given[0]} takes a whole number or a share between 0 and 1, found {count:g}")
        counts = [count for count in (self.last, self.least_useful) if count is not None]
        if self.layers == () or any(count <= 0 for count in counts):
            raise RecipeError(f"{given[0]} takes one layer or more")
        if len(set(self.layers or ())) < len(self.layers or ()):
            raise RecipeError(f"layers names a layer twice: {list(self.layers or ())}")

    def _count(self, there: int) -> int:
        """Number to choose among `there`. A share is rounded to the nearest number, at least 1."""
        if self.layers is not None:
            return len(self.layers)
        given = self.last if self.last is not None else self.least_useful
        assert given is not None, "one of the three is given"
        return int(given) if given >= 1 else max(1, round(given * there))

    def check_parts(self, parts: Parts, what: str) -> None:
        """Remove the choice from `parts` before any step runs; the least useful ones are not known yet. Raises: as
        `choose`."""

        def choose(there: Collection[int]) -> list[int]:
            return self.choose(there, what, lambda count: dict.fromkeys(sorted(there)[:count], 0.0))[0]

        parts.drop(choose, named=self.layers is not None)

    def remove(self, module: PreTrainedModel, there: Collection[int], what: str, least: Least, *, name: str) -> Applied:
        """Choose and remove. name: of the edit (`edgelm.export.module.edits`); the others as of `choose`. The record
        has the chosen indexes and their measured KL."""
        from ...module.edits import edit

        chosen, missed = self.choose(there, what, least)
        edit(module, name, layers=chosen)
        return Applied(module, {"layers": chosen, "kl": {str(i): round(v, 6) for i, v in missed.items()}})

    def choose(self, there: Collection[int], what: str, least: Least) -> tuple[list[int], dict[int, float]]:
        """The chosen indexes in ascending order, and the result of `least`, empty if it was not needed.

        there: indexes to choose from; what: their name in messages. Raises: RecipeError if an index does not exist or
        none would be left.
        """
        order = sorted(there)
        missing = sorted(set(self.layers or ()) - set(order))
        if missing:
            raise RecipeError(f"there is no {what} {missing[0]}: the model has {', '.join(map(str, order))}")
        count = self._count(len(order))
        if count >= len(order):
            raise RecipeError(f"at most {len(order) - 1} of {len(order)} {what}s can be removed, not {count}")
        if self.layers is not None:
            return sorted(self.layers), {}
        if self.last is not None:
            return order[-count:], {}
        found = least(count)
        return sorted(found), found
