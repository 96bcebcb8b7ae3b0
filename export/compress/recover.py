"""`recover`: a short training on text after steps that cost quality. All weights, or a low-rank change of each matrix
(LoRA, Hu et al., arXiv 2106.09685), which needs far less memory and is added to the weights at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from .schedule import Schedule
from .steps import Applied, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recover(Schedule):
    """See `Schedule`. lora_rank: of the change of each linear layer but the head (None: all weights are trained)."""

    lora_rank: int | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if self.lora_rank is not None and self.lora_rank < 1:
            raise RecipeError(f"lora_rank must be 1 or more, found {self.lora_rank}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from .training import next_token, train

        student = copy.deepcopy(module)
        if self.lora_rank is None:
            return Applied(student, train(self, student, student, next_token, bench))
        adapted = _adapted(student, self.lora_rank, self.seed)
        details = train(self, adapted, student, next_token, bench)
        merged: PreTrainedModel = adapted.merge_and_unload().requires_grad_(True)
        return Applied(merged, details)


def _adapted(module: PreTrainedModel, rank: int, seed: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    _require_plain(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The scale 2 (alpha / rank) is the custom; adapters start as no change.
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return get_peft_model(module, settings)


def _require_plain(module: PreTrainedModel) -> None:
    """At the end a change is added to each matrix: twice to one that two layers share, and into its zeros."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from .training import zeros_of

    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    seen: dict[int, str] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not head:
            other = seen.setdefault(id(layer.weight), name)
            if other != name:
                raise RecipeError(f"{name} and {other} share their weights, which lora_rank cannot train: leave it out")
    pruned = zeros_of(dict(module.named_parameters()))
    if pruned:
        raise RecipeError(f"{min(pruned)} was pruned to zeros, which lora_rank would fill: leave it out")
