"""Second moments of what linear layers read, and of the gradients of what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...module.linears import own
from ..progress import tracked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 0  # of the sampled tokens
_STRIPE = 256  # rows of a moment that are added to at once


def input_moments(
    module: PreTrainedModel, names: Sequence[str], texts: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Name of each linear layer -> second moment of its inputs, the mean of x x^T, (inputs, inputs) float32.

    texts: windows (1, tokens) int64. Cost: a forward pass per window.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(ids.numel() for ids in texts)

    def add(name: str) -> Any:
        def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
            # The lower triangle is the upper one's mirror image, and costs as much.
            for begin in range(0, rows.shape[1], _STRIPE):
                stripe = sums[name][begin : begin + _STRIPE, begin:]
                stripe.addmm_(rows[:, begin : begin + _STRIPE].T, rows[:, begin:], alpha=1 / tokens)

        return note

    handles = [own(module, name).register_forward_pre_hook(add(name)) for name in names]
    try:
        for ids in tracked(texts, "windows read"):
            with torch.no_grad():
                module.base_model(input_ids=ids, use_cache=False)  # without the head
    finally:
        for handle in handles:
            handle.remove()
    return {name: upper.triu() + upper.triu(1).T for name, upper in sums.items()}


def gradient_moments(
    module: PreTrainedModel, names: Sequence[str], texts: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Name of each linear layer -> E[g g^T], (outputs, outputs) float32.

    g is the gradient of the log-likelihood of a token sampled from the model, with respect to the layer's output.
    texts: windows (1, tokens) int64. Cost: a forward and backward pass per window.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(ids.numel() for ids in texts)

    def add(name: str, gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2)
        moment = rows.T @ rows / tokens
        sums[name] = sums[name] + moment if name in sums else moment

    chance = torch.Generator().manual_seed(_SEED)
    with without_weight_gradients(module), _gradients(module, names, add):
        for ids in tracked(texts, "windows read for gradients"):
            logits = module(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            chances = torch.softmax(logits.detach().float(), -1)
            bars = torch.rand(len(chances), 1, generator=chance)
            sampled = torch.searchsorted(chances.cumsum(-1), bars).clamp(max=chances.shape[1] - 1)
            # The gradient of the cross-entropy: the probabilities, minus 1 at the sampled token.
            logits.backward(chances.scatter_add_(1, sampled, torch.full_like(bars, -1.0)).to(logits.dtype))
    return sums


@contextlib.contextmanager
def without_weight_gradients(module: PreTrainedModel) -> Iterator[None]:
    """While the block runs, gradients are computed for all activations and no weights."""
    needed = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    embedding: Any = module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        module.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, need in needed:
            parameter.requires_grad_(need)


@contextlib.contextmanager
def _gradients(module: PreTrainedModel, names: Sequence[str], add: Any) -> Iterator[None]:
    """While the block runs, call add(name, gradient of the output of that layer)."""

    def watch(name: str) -> Any:
        def note(_: Any, __: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: add(name, gradient))  # type: ignore[no-untyped-call]

        return own(module, name).register_forward_hook(note)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
