"""The loss of a distillation, with its gradient computed in the same pass.

Autograd would keep five arrays of the size of the logits in float32 (200 MB each for 1,024 tokens and a vocabulary of
49,152), and read each several times. The gradient has a closed form, so a few rows at a time are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_ROWS = 16  # rows at a time: 3 MB with a vocabulary of 49,152, so that they stay in the cache


@dataclass(frozen=True)
class Mix:
    """temperature: T, above 0; alpha: weight of the teacher, 0 to 1."""

    temperature: float
    alpha: float


def divergence(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, mix: Mix) -> torch.Tensor:
    """The loss alpha * T^2 * KL(teacher || student) at temperature T + (1 - alpha) * cross-entropy (Hinton et al.,
    arXiv 1503.02531), mean over tokens, in nats. The factor T^2 keeps the gradient's size when T changes.

    student, teacher: logits (tokens, vocabulary), any float; targets: (tokens) int64. Returns a float32 scalar. Only
    the student's logits get a gradient. Memory: one array like the student's logits.
    """
    loss: torch.Tensor = _Divergence.apply(student, teacher, targets, mix)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, mix: Mix
    ) -> torch.Tensor:
        temperature, alpha, tokens = mix.temperature, mix.alpha, len(student)
        soft, hard = student.new_zeros(2, dtype=torch.float64).unbind()
        gradient = torch.empty_like(student)
        for start in range(0, tokens, _ROWS):
            rows = slice(start, start + _ROWS)
            logits = student[rows].float()
            wanted = torch.log_softmax(teacher[rows].float() / temperature, -1)
            got = torch.log_softmax(logits / temperature, -1)
            shares = wanted.exp()
            soft = soft + (shares * wanted.sub_(got)).sum().double()
            # d(T^2 * KL) / d(logits) = T * (softmax(student / T) - softmax(teacher / T))
            slope = got.exp_().sub_(shares).mul_(alpha * temperature / tokens)
            if alpha < 1:
                hard = hard + _cross_entropy(logits, targets[rows], (1 - alpha) / tokens, slope)
            gradient[rows] = slope
        context.save_for_backward(gradient)
        return ((alpha * temperature**2 * soft + (1 - alpha) * hard) / tokens).float()

    @staticmethod
    def backward(context: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None, None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weight: float, slope: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, float64. Adds weight x its gradient (softmax(logits) - one-hot) to `slope`."""
    says, where = torch.log_softmax(logits, -1), targets[:, None]
    total = -says.gather(1, where).sum().double()
    slope.add_(says.exp_(), alpha=weight)
    slope.scatter_add_(1, where, torch.full_like(where, -weight, dtype=slope.dtype))
    return total
