"""`recover`: a short training on text after steps that cost quality.

It trains all weights, or a low-rank change of each matrix (LoRA, Hu et al., arXiv 2106.09685), which needs far less
memory and is added to the weights at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError
from ..step import Applied, Outlook, Workbench
from ..training.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recover(Schedule):
    """See `Schedule`. lora_rank: rank of the change of each linear layer but the head (None: train all weights)."""

    lora_rank: int | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if self.lora_rank is not None and self.lora_rank < 1:
            raise RecipeError(f"lora_rank must be 1 or more, found {self.lora_rank}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. Also checks that the model's matrices allow changes of this rank."""
        super().check(outlook)
        if self.lora_rank is not None:
            _require_plain(outlook.module, self.lora_rank, outlook.bench)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from ..training.train import next_token, train

        student = copy.deepcopy(module)
        if self.lora_rank is None:
            return Applied(student, train(self, student, student, next_token, bench))
        _require_plain(student, self.lora_rank, bench)
        adapted = _adapted(student, self.lora_rank, self.seed)
        details = train(self, adapted, student, next_token, bench)
        merged: PreTrainedModel = adapted.merge_and_unload().requires_grad_(True)
        return Applied(merged, details)


def _adapted(module: PreTrainedModel, rank: int, seed: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The scale alpha / rank = 2 is customary.
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return get_peft_model(module, settings)


def _require_plain(module: PreTrainedModel, rank: int, bench: Workbench) -> None:
    """Raise RecipeError if adding the changes to the matrices would do harm.

    A matrix that two layers share would get its change twice, and zeros of `prune-magnitude` would be filled.
    """
    from ...module.linears import shape_of
    from ..training.zeros import was_pruned

    if was_pruned(bench.before):
        raise RecipeError("prune-magnitude set weights to zero, which lora_rank would fill: leave one of the two out")
    seen: dict[int, str] = {}
    for name, layer in _adapted_layers(module):
        other = seen.setdefault(id(layer.weight), name)
        if other != name:
            raise RecipeError(f"{name} and {other} share their weights, which lora_rank cannot train: leave it out")
        side = min(shape_of(layer))
        if rank > side:
            raise RecipeError(
                f"lora_rank is {rank}, but the smaller side of {name} is {side}: use a rank of at most {side}, or "
                "leave lora_rank out, because a change of full rank is cheaper without it"
            )


def _adapted_layers(module: PreTrainedModel) -> list[tuple[str, Any]]:
    """All linear layers but the head. A shared layer is listed under each of its names."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [
        (name, layer)
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not head
    ]
