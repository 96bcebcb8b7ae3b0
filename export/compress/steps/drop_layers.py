"""`drop-layers`: remove whole layers, by index or those whose removal changes the predictions least.

The remaining layers keep their indexes, because the manifest lists the source's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..step import Applied, Outlook, Workbench
from .selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DropLayers(Selection):
    """See `Selection`."""

    def check(self, outlook: Outlook) -> None:
        """See `Checked`."""
        from ...module.edits import present_layers

        self.check_parts(outlook.parts("layer", present_layers), "layer")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        from ...module.edits import present_layers
        from ..importance.influence import layer_influence
        from ..importance.leaving_out import least_missed_layers

        def least(count: int) -> dict[int, float]:
            influence = layer_influence(module, bench.token_ids, bench.context_length)
            return least_missed_layers(module, count, bench.token_ids, bench.context_length, influence)

        return self.remove(module, present_layers(module), "layer", least, name="drop_layers")
