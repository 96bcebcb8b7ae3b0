"""A compressed model as a folder: Hugging Face's files and a record of the compression.

    config.json          the source's, with structural edits under `edgelm_edits`
    model.safetensors    float32; a shared matrix is stored once
    compression.json     source, name, recipe, and each step's settings, choices and figures
    tokenizer files and generation_config.json of the source

Exporting this folder gives the same graph and weights as exporting the source with the recipe.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.package import write_json
from ..source.compressed import RECORD_NAME, VERSION, WEIGHTS_NAME, Record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_compressed(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record, folder: Path) -> None:
    """Write a compressed model into an empty folder. Raises: OSError."""
    from safetensors.torch import save_file

    tokenizer.save_pretrained(folder)
    module.config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    save_file(_tensors(module), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / RECORD_NAME, {"version": VERSION, **dataclasses.asdict(record)})
    # safetensors creates its file readable by the owner only.
    shutil.copymode(folder / RECORD_NAME, folder / WEIGHTS_NAME)


def _tensors(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> tensor. A shared tensor is kept once, under its first name.

    safetensors' `save_model` also writes the other names, in an order that varies between runs.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach().contiguous()))
    return dict(found.values())
