"""`quantization-aware`: a short training in which every matrix product is computed as the INT8 bundle will compute it
(Jacob et al., arXiv 1712.05877), towards the answers that the model gives without rounding (LLM-QAT, arXiv 2305.17888).

The text's own tokens are not learned: a model that knows the text would learn it by heart, which costs it more on other
texts than rounding does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...errors import RecipeError
from ..step import Applied, Workbench
from ..training.schedule import Keep, Schedule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizationAware(Schedule):
    """See `Schedule`; the scheme is int8-rowwise. learning_rate: lower than elsewhere, the model is good already;
    weight_bits: as the target's profile says, 8 or 7; activation_bits: 16, as most matrices of a bundle have, or 8."""

    KEEPS: ClassVar[Keep] = "kl"

    learning_rate: float = 1e-5
    weight_bits: int = 8
    activation_bits: int = 16

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if self.weight_bits not in (7, 8):
            raise RecipeError(f"weight_bits must be 7 or 8, found {self.weight_bits}")
        if self.activation_bits not in (8, 16):
            raise RecipeError(f"activation_bits must be 8 or 16, found {self.activation_bits}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from ..training.simulate import Int8
        from ..training.train import distillation, train

        student = copy.deepcopy(module)
        # It rounds products with the student's weights alone, and its teacher, the module as it came, has others.
        int8 = Int8(student, self.weight_bits, self.activation_bits)
        divergence = distillation(module, temperature=1.0, alpha=1.0)

        def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
            with int8:
                return divergence(model, rows)

        try:
            return Applied(student, train(self, student, student, loss, bench, within=int8))
        finally:
            module.cpu()  # a teacher goes where the student is trained
