"""Weights of a checkpoint that the model of its configuration has no place for.

transformers leaves them out with a note. Such a model computes something else than the one that was trained, and no
comparison with torch can tell, because torch runs the same mutilated model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Older versions of transformers saved what a model computes from its configuration: no weight is called so.
_COMPUTED = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached")
# What a missing key of the configuration leaves without a place, by how the names of the weights end, and the advice.
_ADVICE = (
    (("_scale", "_scale_inv", ".SCB", ".scales"), "they are scales of quantized weights: add its quantization_config"),
    ((".bias",), "a model with biases says so in its configuration, as attention_bias or mlp_bias"),
    (("lora_A.weight", "lora_B.weight"), "they are of an adapter: merge it into the model (peft's merge_and_unload)"),
)
_SHOWN = 3


def check_unused(folder: Path, module: PreTrainedModel, unused: Collection[str]) -> None:
    """Does the model use every weight of its files? Tensors that it computes anew are no weights.

    unused: names, as the files have them, that transformers found no place for and does not know to be spare. Cost:
    reads those of them that may be masks. Raises: SourceError.
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
    """Those of a folder's tensors that have as many dimensions as a mask."""
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
