"""Reading a compressed model's folder: its record, and the module that it describes. `compress/folder.py` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.manifest import Source
from ...runtime.host.files import MODEL_TEXT_BYTES, read_text
from ..errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_NAME = "compression.json"
WEIGHTS_NAME = "model.safetensors"
VERSION = 1  # of the record
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


def read_record(folder: Path) -> Record | None:
    """The record of a compressed folder; None for any other folder. Raises: SourceError if it cannot be read."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(read_text(path, MODEL_TEXT_BYTES))
        if data.pop("version") != VERSION:
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

    from ..module.edits import KEY, replay

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    edits = list(getattr(config, KEY, None) or [])
    make: Any = transformers.AutoModelForCausalLM.from_config
    with no_init_weights():
        module: PreTrainedModel = make(config, dtype=torch.float32, trust_remote_code=False).eval()
    module.tie_weights()
    replay(module, edits)
    load_model(module, folder / WEIGHTS_NAME)
    if (folder / "generation_config.json").is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module
