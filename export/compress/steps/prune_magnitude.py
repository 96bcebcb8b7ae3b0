"""`prune-magnitude`: set the smallest weights of each linear layer to zero (unstructured pruning).

It reduces the size of compressed downloads but saves no time: ONNX Runtime has no kernels for sparse matrices, so zeros
are stored and multiplied like other numbers. Weights are ranked within each matrix, because matrices differ in scale: a
ranking over the model would empty the matrices of small scale first.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError
from ..step import Applied, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LIMIT = 127


@dataclass(frozen=True)
class PruneMagnitude:
    """ratio: share of each linear layer's weights to set to zero, those of least magnitude (L1). The head is included
    unless it is tied to the embedding."""

    ratio: float

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: each matrix is sorted once and compressed by zlib twice."""
        import torch
        from torch.nn.utils import prune

        weights = _weights(module)
        before = after = zeros = 0
        method: Any = prune.L1Unstructured(self.ratio)
        for weight in weights:
            before += _compressed_bytes(weight)
            # Apply the mask in place: torch's parametrization replaces the parameter, which would no longer be shared.
            weight.mul_(method.compute_mask(weight, torch.ones_like(weight)))
            after += _compressed_bytes(weight)
            zeros += int((weight == 0).sum())
        share = 100 * zeros / sum(weight.numel() for weight in weights)
        details = {"zeros_percent": round(share, 2), "compressed_bytes": [before, after]}
        note = (
            f"the INT8 matrices, compressed by zlib: {before / 1e6:,.2f} -> {after / 1e6:,.2f} MB; zeros save no time"
        )
        return Applied(module, {**details, "note": note})


def _weights(module: PreTrainedModel) -> list[torch.Tensor]:
    """Detached weights of all linear layers, each once, without a head tied to the embedding."""
    from ...module.linears import is_linear

    embedding = module.get_input_embeddings().weight
    linears: list[Any] = [part for part in module.modules() if is_linear(part)]
    found = {id(part.weight): part.weight for part in linears}
    return [weight.detach() for weight in found.values() if weight is not embedding]


def _compressed_bytes(weight: torch.Tensor) -> int:
    """Bytes of a matrix in INT8 after zlib, which archives and package managers use."""
    from ...passes.quantize_linears import quantize_columns

    # The bundle has a scale per output. For a Conv1D this takes one per input, which hardly changes the figure.
    return len(zlib.compress(quantize_columns(weight.numpy().T, _LIMIT).tobytes()))
