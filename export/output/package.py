"""The files of a bundle besides graph and report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...runtime.bundle import folder as names
from ...runtime.bundle.folder import file_digest
from ...runtime.bundle.manifest import FileEntry

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


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, ending in a line feed."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file of a folder, sorted by name."""
    return {path.name: FileEntry(path.stat().st_size, file_digest(path)) for path in sorted(folder.iterdir())}
