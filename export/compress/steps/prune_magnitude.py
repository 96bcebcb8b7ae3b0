"""`prune-magnitude`: set the smallest weights of each linear layer to zero, without structure.

It saves size where bundles are compressed for download, and no time: ONNX Runtime has no kernels for sparse matrices,
so zeros are stored and multiplied like all others. The ranking is within each matrix, not over the model: matrices
differ in scale, and one order for all would empty the small-scaled ones first.
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
    """ratio: share of the weights of each linear layer, the head included unless it is the embedding, that become
    zero: those of least magnitude (L1)."""

    ratio: float

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: each matrix is sorted, and compressed twice."""
        import torch
        from torch.nn.utils import prune

        weights = _weights(module)
        before = after = zeros = 0
        method: Any = prune.L1Unstructured(self.ratio)
        for weight in weights:
            before += _compressed_bytes(weight)
            # The method's mask, not its parametrization: a parameter that is replaced would no longer be shared.
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
    """The weights of all linear layers, each once, detached; a table that is read by its rows is not among them."""
    from ..module.linears import is_linear

    embedding = module.get_input_embeddings().weight
    linears: list[Any] = [part for part in module.modules() if is_linear(part)]
    found = {id(part.weight): part.weight for part in linears}
    return [weight.detach() for weight in found.values() if weight is not embedding]


def _compressed_bytes(weight: torch.Tensor) -> int:
    """The size of a matrix in INT8 after zlib, which archives and package managers use."""
    from ...passes.quantize_linears import quantize_columns

    # Scales are by output in the bundle: rows here, or columns in a Conv1D, which changes this figure by little.
    return len(zlib.compress(quantize_columns(weight.numpy().T, _LIMIT).tobytes()))
