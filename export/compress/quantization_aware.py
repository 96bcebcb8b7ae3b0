"""`quantization-aware`: a short training in which every matrix product is computed as the INT8 bundle will compute it,
so that the weights settle where rounding costs least (Jacob et al., arXiv 1712.05877)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .schedule import Schedule
from .steps import Applied, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizationAware(Schedule):
    """See `Schedule`; the scheme is int8-rowwise. learning_rate: lower than elsewhere, the model is good already;
    weight_bits: as the target's profile says, 8 or 7."""

    learning_rate: float = 1e-4
    weight_bits: int = 8

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if self.weight_bits not in (7, 8):
            raise RecipeError(f"weight-bits must be 7 or 8, found {self.weight_bits}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from .simulate import Int8
        from .training import next_token, train

        student = copy.deepcopy(module)
        int8 = Int8(student, self.weight_bits)

        def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
            with int8:
                return next_token(model, rows)

        return Applied(student, train(self, student, student, loss, bench))
