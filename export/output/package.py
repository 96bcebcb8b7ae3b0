"""Put a bundle into place: all of it or nothing.

Everything is written into a hidden folder beside the output, the manifest last; then one rename makes it the output.
An export that is interrupted leaves at most that hidden folder, which no part of edgelm takes for a bundle and the next
export to the same place removes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ...runtime.bundle import folder as names
from ...runtime.bundle.folder import file_digest
from ...runtime.bundle.manifest import MANIFEST_NAME, FileEntry
from ..errors import OutputError

_PARTIAL = ".partial-"
_TOKENIZER_FILES = (
    names.TOKENIZER_NAME,
    names.TOKENIZER_CONFIG_NAME,
    names.CHAT_TEMPLATE_NAME,
    names.GENERATION_CONFIG_NAME,
)


def check_output(out: Path, force: bool, mark: str = MANIFEST_NAME) -> None:
    """Before any work: may a folder be written here? mark: the file by which one of its kind is known, the only kind
    that is replaced. Raises: OutputError."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputError(f"{out} exists: choose another place with --out, or replace it with --force")
    if not (out / mark).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists and has no {mark}, so --force does not replace it: choose another place with --out"
        )


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed with all that is in it when the block ends, however it ends.

    Raises: OutputError, also for what the system says about writing inside the block (disk full, no permission).
    """
    folder = out.parent / f".{out.name}{_PARTIAL}{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder.mkdir()
    except OSError as error:
        raise _output_error(out, error) from error
    try:
        yield folder
    except OSError as error:
        raise _output_error(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a finished folder to the output. A bundle that stands there is moved aside first and removed afterwards,
    so that at no time a mixture of the two can be seen. Raises: OSError."""
    for path in [*folder.iterdir(), folder]:
        _flush(path)
    aside = out.parent / f".{out.name}{_PARTIAL}{os.getpid()}-replaced"
    if out.exists():
        out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    _flush(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_tokenizer(tokenizer: Any, module: Any, folder: Path) -> None:
    """tokenizer.json, its configuration, the chat template and the generation configuration, as transformers writes
    them; what else it writes is left out. Several chat templates under names are kept in the configuration."""
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
    """Indented JSON, ending in a line feed."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file of a folder, sorted by name."""
    return {path.name: FileEntry(path.stat().st_size, file_digest(path)) for path in sorted(folder.iterdir())}


def _remove_abandoned(out: Path) -> None:
    """Remove the hidden folders of exports to this place whose process is gone."""
    prefix = f".{out.name}{_PARTIAL}"
    for path in out.parent.iterdir():
        owner = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make sure that a file or a folder is on the disk before its name is."""
    if os.name == "nt":
        return  # folders cannot be opened there, and a rename is written through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(out: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"no room to write {out} ({error.strerror}): free some space or choose another place with --out"
        )
    return OutputError(f"{out} cannot be written ({error}): choose another place with --out")
