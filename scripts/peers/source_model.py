"""The compared model: recognized by its files, and readable for every peer's version of transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(model: Path) -> str:
    """A digest that identifies a model in any folder: its config, and size and beginning of its weights."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(str(path.stat().st_size).encode() + file.read(2**20))
    return digest.hexdigest()[:8]


def readable(model: Path, folder: Path) -> Path:
    """The same model, as links, also readable by transformers 4, which expects rope's base and the tokenizer's class
    under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file():
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    _replace(folder / "config.json", config)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        settings = json.loads(tokenizer.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        _replace(tokenizer, settings)
    return folder


def _replace(link: Path, content: dict[str, Any]) -> None:
    link.unlink()
    link.write_text(json.dumps(content, indent=2), encoding="utf-8")
