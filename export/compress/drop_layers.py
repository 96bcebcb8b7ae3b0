"""`drop-layers`: leave whole layers out, by index or those that change least of what passes through them.

Layers keep their indexes: the manifest counts those of the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .selection import Selection
from .steps import Applied, Outlook, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DropLayers(Selection):
    """See `Selection`. The influence of a layer is block influence."""

    def check(self, outlook: Outlook) -> None:
        """See `Checked`."""
        from .edits import present_layers

        self.check_parts(outlook.parts("layer", present_layers), "layer")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Layers keep their indexes."""
        from .edits import edit, present_layers
        from .influence import layer_influence

        chosen, influence = self.choose(
            present_layers(module), "layer", lambda: layer_influence(module, bench.token_ids, bench.context_length)
        )
        edit(module, "drop_layers", layers=chosen)
        return Applied(module, {"layers": chosen, "influence": {str(i): round(v, 6) for i, v in influence.items()}})
