"""The files of a tokenizer that a bundle keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...runtime.bundle import folder as names

_TOKENIZER_FILES = (
    names.TOKENIZER_NAME,
    names.TOKENIZER_CONFIG_NAME,
    names.CHAT_TEMPLATE_NAME,
    names.GENERATION_CONFIG_NAME,
)


def write_tokenizer(tokenizer: Any, module: Any, folder: Path) -> None:
    """Write tokenizer.json, its configuration, the chat template and the generation configuration, as transformers
    does, but no other files. Several named chat templates go into the configuration."""
    scratch = folder / "tokenizer"
    scratch.mkdir()
    tokenizer.save_pretrained(scratch, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    if module.generation_config is not None:
        module.generation_config.save_pretrained(scratch)
    for name in _TOKENIZER_FILES:
        if (scratch / name).is_file():
            (scratch / name).rename(folder / name)
    shutil.rmtree(scratch)
