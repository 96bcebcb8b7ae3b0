"""Read config.json of a model folder; shorten errors of other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.bundle.manifest import MANIFEST_NAME
from ...runtime.host.files import MODEL_TEXT_BYTES, NoTextError, read_text
from ..errors import SourceError

CONFIG_NAME = "config.json"
_ADAPTER_NAME = "adapter_config.json"


def refuse_adapter(folder: Path) -> None:
    """Raises: SourceError for a folder of peft with an adapter instead of a model."""
    path = folder / _ADAPTER_NAME
    if not path.is_file() or (folder / CONFIG_NAME).is_file():
        return
    try:
        found = json.loads(read_text(path, MODEL_TEXT_BYTES))
    except (OSError, ValueError, RecursionError):
        found = None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    raise SourceError(
        f"{folder} holds an adapter (LoRA) for {base or 'another model'}, and no model: merge the two first, by peft's "
        "merge_and_unload() and save_pretrained(), and export the result"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises: SourceError."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(read_text(path, MODEL_TEXT_BYTES))
    except NoTextError as error:
        raise SourceError(f"{path}: {error.strerror}: download the model again") from error
    except OSError as error:
        if (folder / MANIFEST_NAME).is_file():
            raise SourceError(f"{folder} is a bundle: give the model that it was exported from") from error
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): give a folder in Hugging Face's format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object: download the model again")
    return config


def one_line(error: Exception) -> str:
    """An error's message in one line of up to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
