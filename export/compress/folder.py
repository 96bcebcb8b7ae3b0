"""A compressed model as a folder: Hugging Face's files and a record of the compression.

    config.json          the source's, with structural edits under `edgelm_edits`
    model.safetensors    float32; a shared matrix is stored once
    compression.json     source, name, recipe, and each step's settings, choices and figures
    tokenizer files and generation_config.json of the source

Exporting this folder gives the same graph and weights as exporting the source with the recipe.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.manifest import Source
from ...runtime.host.files import MODEL_TEXT_BYTES, read_text
from ..errors import SourceError
from ..output.package import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD_NAME = "compression.json"
_WEIGHTS_NAME = "model.safetensors"
_VERSION = 1
# Keys of a recorded step that hold measurements.
_MEASURED = ("before", "after", "training")


@dataclass(frozen=True)
class Record:
    """compression.json. source, name: the original model; recipe: name; steps: settings of each step, with its
    `details`, figures `before` and `after` it, and for a training step its curve under `training`."""

    source: Source
    name: str
    recipe: str
    steps: tuple[dict[str, Any], ...]


def without_figures(step: dict[str, Any]) -> dict[str, Any]:
    """A recorded step without measurements: its settings and choices, which are the same in every run."""
    return {key: value for key, value in step.items() if key not in _MEASURED}


def settings_of(step: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded step."""
    return {key: value for key, value in without_figures(step).items() if key not in ("details", "promise")}


def write_compressed(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record, folder: Path) -> None:
    """Write a compressed model into an empty folder. Raises: OSError."""
    from safetensors.torch import save_file

    tokenizer.save_pretrained(folder)
    module.config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    save_file(_tensors(module), folder / _WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / RECORD_NAME, {"version": _VERSION, **dataclasses.asdict(record)})
    # safetensors creates its file readable by the owner only.
    shutil.copymode(folder / RECORD_NAME, folder / _WEIGHTS_NAME)


def _tensors(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> tensor. A shared tensor is kept once, under its first name.

    safetensors' `save_model` also writes the other names, in an order that varies between runs.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach().contiguous()))
    return dict(found.values())


def read_record(folder: Path) -> Record | None:
    """The record of a compressed folder; None for any other folder. Raises: SourceError if it cannot be read."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(read_text(path, MODEL_TEXT_BYTES))
        if data.pop("version") != _VERSION:
            raise SourceError(f"{path} was written by another version of edgelm: compress the model again")
        return Record(Source(**data.pop("source")), steps=tuple(data.pop("steps")), **data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{path} cannot be read ({error}): compress the model again") from error


def load_compressed(folder: Path) -> PreTrainedModel:
    """Build the model from its configuration, replay its edits and load the weights. float32, evaluation mode.

    Raises: SourceError for edits that are unknown or do not fit; errors of transformers, safetensors and torch for
    damaged files.
    """
    import torch
    import transformers
    from safetensors.torch import load_model
    from transformers.initialization import no_init_weights

    from .module.edits import KEY, replay

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    edits = list(getattr(config, KEY, None) or [])
    make: Any = transformers.AutoModelForCausalLM.from_config
    with no_init_weights():
        module: PreTrainedModel = make(config, dtype=torch.float32, trust_remote_code=False).eval()
    module.tie_weights()
    replay(module, edits)
    load_model(module, folder / _WEIGHTS_NAME)
    if (folder / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module
