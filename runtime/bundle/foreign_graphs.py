"""The ONNX files of a folder that another exporter wrote: one graph, a pair, or the pair in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingsError
from .manifest import MANIFEST_NAME

_FIRST, WITH_PAST, _MERGED = "decoder_model", "decoder_with_past_model", "decoder_model_merged"


@dataclass(frozen=True)
class Graphs:
    """The ONNX files of one model: `main` takes the past; `first` is for the first step, where that is another file."""

    main: Path
    first: Path | None = None

    @property
    def files(self) -> list[Path]:
        """`main`, and `first` where there is one."""
        return [path for path in (self.main, self.first) if path is not None]


def is_foreign(folder: Path) -> bool:
    """Whether a folder has ONNX files and no manifest."""
    return not (folder / MANIFEST_NAME).exists() and bool(_onnx_files(folder))


def find_graphs(folder: Path, graph: str | None = None) -> Graphs:
    """The ONNX files of one model in a folder: the one that `graph` names with its partner, else the obvious ones.

    Obvious are a single file, or the files of one decoder under their usual names. Raises: SettingsError, which lists
    the files.
    """
    found = _onnx_files(folder)
    if graph is not None:
        named = folder / graph
        inside = not Path(graph).is_absolute() and ".." not in Path(graph).parts
        if not inside or named.suffix != ".onnx" or not named.is_file():
            raise SettingsError(f"{folder} holds no {graph}: name one of {_listed(folder, found)}")
        return _with_partner(named)
    by_stem = {path.stem: path for path in found}
    if len(by_stem) == len(found) and by_stem.keys() <= {_FIRST, WITH_PAST, _MERGED}:
        return _with_partner(by_stem.get(_MERGED) or by_stem.get(_FIRST) or found[0])
    if len(found) > 1:
        example = found[0].relative_to(folder).as_posix()
        raise SettingsError(
            f"{folder} holds several models: {_listed(folder, found)}; name the one to take, as in  "
            f'--graph {example}  or  load(..., graph="{example}")'
        )
    return Graphs(found[0])


def _with_partner(path: Path) -> Graphs:
    """The model that a file belongs to: decoder_model*.onnx and decoder_with_past_model*.onnx are a pair."""
    if path.stem.startswith(_MERGED):
        return Graphs(path)
    for first in (path, path.with_name(path.name.replace(WITH_PAST, _FIRST, 1))):
        later = first.with_name(first.name.replace(_FIRST, WITH_PAST, 1))
        if first.name.startswith(_FIRST) and first.is_file() and later.is_file():
            return Graphs(later, first)
    return Graphs(path)


def _onnx_files(folder: Path) -> list[Path]:
    """In the folder itself or one below it; transformers.js has them in  onnx/ ."""
    return sorted(path for pattern in ("*.onnx", "*/*.onnx") for path in folder.glob(pattern))


def _listed(folder: Path, paths: Sequence[Path]) -> str:
    return ", ".join(path.relative_to(folder).as_posix() for path in paths)
