"""Linear layers as a matrix (outputs, inputs) with an optional bias, independent of how they are stored.

transformers uses `torch.nn.Linear` and, in models like GPT-2, `Conv1D`, whose weight is transposed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import RecipeError
from .structure import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FactoredLinear(torch.nn.Module):
    """A matrix as a product: `wide` (outputs, rank) times `narrow` (rank, inputs). The bias belongs to `wide`."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.narrow = torch.nn.Linear(inputs, rank, bias=False)
        self.wide = torch.nn.Linear(rank, outputs, bias=bias)

    @classmethod
    def like(cls, linear: Any, rank: int) -> FactoredLinear:
        """A factored layer with the shape and bias of `linear`. Its weights are random."""
        outputs, inputs = shape_of(linear)
        factored = cls(inputs, rank, outputs, linear.bias is not None)
        if linear.bias is not None:
            factored.wide.bias = linear.bias
        return factored.eval()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        result: torch.Tensor = self.wide(self.narrow(hidden_states))
        return result


def is_linear(part: torch.nn.Module) -> bool:
    """Whether a module is a plain linear layer. Subclasses are not, because they may compute something else."""
    from transformers.pytorch_utils import Conv1D

    return type(part) in (torch.nn.Linear, Conv1D)


def layer_linears(module: PreTrainedModel) -> dict[str, int]:
    """Name of each linear layer inside a decoder layer -> index of the decoder layer, in order. Raises: RecipeError."""
    found = {}
    for index, layer in decoder_layers(module).items():
        names = [name for name, part in module.get_submodule(layer).named_modules() if is_linear(part)]
        found.update({f"{layer}.{name}": index for name in names})
    return found


def own(module: PreTrainedModel, name: str) -> Any:
    """A linear layer by its name."""
    return module.get_submodule(name)


def matrix_of(linear: Any) -> torch.Tensor:
    """The weight as a detached view (outputs, inputs). Writing to it changes the layer."""
    weight: torch.Tensor = linear.weight.detach()
    return weight if isinstance(linear, torch.nn.Linear) else weight.T


def shape_of(linear: Any) -> tuple[int, int]:
    """Shape of the matrix, (outputs, inputs)."""
    outputs, inputs = matrix_of(linear).shape
    return int(outputs), int(inputs)


def put_matrix(linear: Any, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace a linear layer's matrix (outputs, inputs) and bias (outputs) by new parameters."""
    outputs, inputs = (int(size) for size in matrix.shape)
    plain = isinstance(linear, torch.nn.Linear)
    linear.weight = torch.nn.Parameter((matrix if plain else matrix.T).contiguous())
    linear.bias = None if bias is None else torch.nn.Parameter(bias.contiguous())
    if plain:
        linear.out_features, linear.in_features = outputs, inputs
    else:
        linear.nf, linear.nx = outputs, inputs


def shared_matrices(module: PreTrainedModel, group: list[int]) -> list[list[str]]:
    """Names of the linear layers in a group of decoder layers, as one list per matrix to share.

    group: indexes of layers. Raises: RecipeError if the layers' matrices differ in name, number or shape.
    """
    layers = decoder_layers(module)
    parts: list[dict[str, Any]] = [
        {name: part for name, part in module.get_submodule(layers[index]).named_modules() if is_linear(part)}
        for index in group
    ]
    for index, linears in zip(group[1:], parts[1:], strict=True):
        if {name: shape_of(part) for name, part in linears.items()} != {
            name: shape_of(part) for name, part in parts[0].items()
        }:
            raise RecipeError(f"layers {group[0]} and {index} differ in their matrices, so they cannot share them")
    return [[f"{layers[index]}.{name}" for index in group] for name in parts[0]]


def require_unshared(module: PreTrainedModel, names: list[str], step: str) -> None:
    """Raise RecipeError if one of these linear layers shares its matrix with another part of the model."""
    owners: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name in names:
        if owners[id(own(module, name).weight)] > 1:
            raise RecipeError(
                f"{name} shares its matrix with another part of the model: put {step} before share-weights"
            )
