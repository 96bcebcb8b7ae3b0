"""Detect weights of a checkpoint that the configuration's model does not use.

transformers ignores them with a note. Such a model is not the one that was trained, and a comparison with torch cannot
show it, because torch runs the same wrong model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Values that older versions of transformers saved though the model computes them; no weight has such a name.
_COMPUTED = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached")
# Advice by the suffix of unused weights: which key of the configuration may be missing.
_ADVICE = (
    (("_scale", "_scale_inv", ".SCB", ".scales"), "they are scales of quantized weights: add its quantization_config"),
    ((".bias",), "a model with biases says so in its configuration, as attention_bias or mlp_bias"),
    (("lora_A.weight", "lora_B.weight"), "they are of an adapter: merge it into the model (peft's merge_and_unload)"),
)
_SHOWN = 3


def check_unused(folder: Path, module: PreTrainedModel, unused: Collection[str]) -> None:
    """Check that the model uses every weight of its files. Tensors that it computes itself do not count.

    unused: names in the files that transformers did not use and does not know to be spare. Cost: reading those that may
    be masks. Raises: SourceError.
    """
    buffers = {name for name, _ in module.named_buffers()}
    suspects = [name for name in sorted(unused) if name not in buffers and not _is_computed(name)]
    masks = {name for name, tensor in _read(folder, suspects) if _is_causal_mask(tensor)}
    left_out = [name for name in suspects if name not in masks]
    if left_out:
        shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
        raise SourceError(
            f"{folder}: the model that config.json describes does not use {len(left_out)} of its weights ({shown}), "
            f"so it would not be the model that was trained: {_advice(left_out)}"
        )


def _is_computed(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _COMPUTED


def _advice(names: Collection[str]) -> str:
    for endings, advice in _ADVICE:
        if any(name.endswith(endings) for name in names):
            return f"{advice}, or download the model again"
    return "correct config.json, or download the model again"


def _read(folder: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a folder that have as many dimensions as a mask."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")) if names else ():
        with safe_open(path, framework="pt") as file:
            for name in set(names) & set(file.keys()):
                shape = file.get_slice(name).get_shape()
                if len(shape) == 4 and shape[2] == shape[3]:
                    yield name, file.get_tensor(name)


def _is_causal_mask(tensor: Any) -> bool:
    """Whether a tensor of (1, 1, n, n) is ones on and below the diagonal and zeros above it."""
    import torch

    rows = tensor[0, 0].to(torch.float32)
    return tensor.shape[:2] == (1, 1) and torch.equal(rows, torch.ones_like(rows).tril())
