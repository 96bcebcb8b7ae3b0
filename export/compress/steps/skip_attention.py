"""`skip-attention`: remove attention sublayers and keep the MLPs of their layers, which then need no KV cache.

Later attention sublayers are redundant more often than earlier ones (Tyukin et al., arXiv 2404.05741).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..step import Applied, Outlook, Workbench
from .selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SkipAttention(Selection):
    """See `Selection`."""

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. Attention sublayers of layers removed by earlier steps do not count."""
        from ...module.edits import present_layers
        from ...module.structure import attention_sublayers

        layers = outlook.parts("layer", present_layers)
        attention = outlook.parts("attention sublayer", attention_sublayers)
        attention.bound(layers)
        self.check_parts(attention, "attention sublayer")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        from ...module.structure import attention_sublayers
        from ..importance.influence import attention_influence
        from ..importance.leaving_out import least_missed_attention

        def least(count: int) -> dict[int, float]:
            influence = attention_influence(module, bench.token_ids, bench.context_length)
            return least_missed_attention(module, count, bench.token_ids, bench.context_length, influence)

        return self.remove(module, attention_sublayers(module), "attention sublayer", least, name="skip_attention")
