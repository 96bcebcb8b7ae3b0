"""config.json of a model folder, and the words of others' errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.host.files import MODEL_TEXT_BYTES, read_text
from ..errors import SourceError

CONFIG_NAME = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises: SourceError."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(read_text(path, MODEL_TEXT_BYTES))
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): give a folder in Hugging Face's format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object: download the model again")
    return config


def one_line(error: Exception) -> str:
    """What an error says, in one line of up to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
