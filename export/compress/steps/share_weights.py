"""`share-weights`: several parts of a model use one matrix, which is stored once in memory and in every file.

Layers share the matrices of their linear layers and keep their own norms and biases. The head can share the embedding's
matrix. This saves size but no time, because shared layers are still computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import RecipeError
from ..step import Applied, Outlook, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ShareWeights:
    """embedding: head and embedding share; groups: lists of indexes of layers that share; every: each run of this many
    remaining layers shares; value: the shared matrix, the "mean" of those that it replaces or the "first" of them (with
    `embedding`: the embedding's)."""

    embedding: bool = False
    groups: tuple[tuple[int, ...], ...] | None = None
    every: int | None = None
    value: Literal["mean", "first"] = "mean"

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if self.groups is not None and self.every is not None:
            raise RecipeError("give one of groups and every, found both")
        if not self.embedding and self.groups is None and self.every is None:
            raise RecipeError("give embedding = true, groups or every")
        if self.every is not None and self.every < 2:
            raise RecipeError(f"every must be 2 or more, found {self.every}")
        named = [index for group in self.groups or () for index in group]
        if self.groups is not None and (not self.groups or any(len(group) < 2 for group in self.groups)):
            raise RecipeError("each group must name two layers or more")
        if len(set(named)) < len(named):
            raise RecipeError(f"groups name a layer twice: {sorted(named)}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`."""
        from ...module.edits import present_layers

        self._require(outlook.parts("layer", present_layers).left)
        self._require_head(outlook.module)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        from ...module.edits import edit
        from ...module.linears import matrix_of, own, shared_matrices

        groups = self._layers(module)
        matrices = [names for group in groups for names in shared_matrices(module, group)]
        self._require_head(module)
        for names in matrices:
            if self.value == "mean":
                first, *others = (matrix_of(own(module, name)) for name in names)
                for other in others:
                    first += other
                first /= len(names)
        if self.embedding and self.value == "mean":
            whole: Any = module
            table = whole.get_input_embeddings().weight.detach()
            table += whole.get_output_embeddings().weight.detach()
            table /= 2
        edit(module, "share", groups=groups, embedding=self.embedding)
        return Applied(module, {"groups": groups})

    def _layers(self, module: PreTrainedModel) -> list[list[int]]:
        from ...module.edits import present_layers

        order = list(present_layers(module))
        self._require(order)
        if self.every is None:
            return [list(group) for group in self.groups or ()]
        groups = [order[begin : begin + self.every] for begin in range(0, len(order), self.every)]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            raise RecipeError(f"every = {self.every} needs two layers or more, but the model has {len(order)}")
        return groups

    def _require(self, order: list[int]) -> None:
        missing = sorted({index for group in self.groups or () for index in group} - set(order))
        if missing:
            raise RecipeError(f"there is no layer {missing[0]}: the model has {', '.join(map(str, order))}")

    def _require_head(self, module: PreTrainedModel) -> None:
        if not self.embedding:
            return
        whole: Any = module
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        if head is None or embedding.weight.shape != head.weight.shape:
            raise RecipeError(f"{type(module).__name__} has no head with the embedding's shape, so they cannot share")
        if head.weight is embedding.weight:
            raise RecipeError(f"{type(module).__name__} shares embedding and head already: leave embedding out")
