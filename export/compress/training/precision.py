"""Precision of the matrix products in a training.

In bfloat16 (mixed precision, Micikevicius et al., arXiv 1710.03740; bfloat16 needs no loss scaling, Kalamkar et al.,
arXiv 1905.12322) weights are stored in float32 and rounded for each product; the results of products, logits included,
are rounded too. Norms, the loss, the sums of gradients and AdamW's moments stay in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]

# x86 processors without these instructions emulate bfloat16, which is slower than float32. Arm's were not measured.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def fastest(device: torch.device) -> Precision:
    """The precision in which a device trains fastest."""
    import torch

    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and any(found.get(name, False) for name in _INSTRUCTIONS)
    return "bfloat16" if fast else "float32"


def products_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Context in which modules multiply matrices in this precision."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
