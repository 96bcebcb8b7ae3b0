"""`quantization-aware`: a short training with every matrix product computed as in the quantized bundle (Jacob et al.,
arXiv 1712.05877). The teacher is the same model without rounding (LLM-QAT, arXiv 2305.17888).

The loss does not use the text's own tokens: a model that knows the text would memorize it, which costs more on other
texts than rounding does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...codes.nibbles import WIDTHS
from ...errors import RecipeError
from ..step import Applied, Workbench
from ..training.precision import Precision
from ..training.schedule import Keep, Schedule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizationAware(Schedule):
    """See `Schedule`. learning_rate: low, because the model starts near the minimum; precision: float32 only,
    because in bfloat16 the products would not be those of the bundle; weight_bits: 8 or 7, as in the
    target's profile (int8-rowwise), or 4, 5 or 6 for all matrices (int4-rowwise); activation_bits: 16, as for most
    matrices of a bundle, or 8."""

    KEEPS: ClassVar[Keep] = "kl"

    learning_rate: float = 1e-5
    precision: Precision | None = "float32"
    weight_bits: int = 8
    activation_bits: int = 16

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if self.weight_bits not in (*WIDTHS, 7, 8):
            raise RecipeError(f"weight_bits must be 4 to 8, found {self.weight_bits}")
        if self.precision != "float32":
            raise RecipeError('precision must be "float32": in bfloat16 the products would not be those of the bundle')
        if self.activation_bits not in (8, 16):
            raise RecipeError(f"activation_bits must be 8 or 16, found {self.activation_bits}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from ..training.simulate import Quantized
        from ..training.train import distillation, train

        student = copy.deepcopy(module)
        # It rounds products with the student's weights only, so the teacher (`module`) is not rounded. Blocks fit the
        # teacher's weights, which a training that is resumed starts with too.
        rounded = Quantized(student, self.weight_bits, self.activation_bits, module)
        divergence = distillation(module, temperature=1.0, alpha=1.0)

        def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
            with rounded:
                return divergence(model, rows)

        try:
            return Applied(student, train(self, student, student, loss, bench, within=rounded))
        finally:
            module.cpu()  # the loss moved the teacher to the student's device
