"""Find a model: a local folder or GGUF file, a model of the hub, or the one that comes with edgelm.

Checks everything that is possible without loading weights. Only hub ids use the network.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ..errors import SourceError
from . import gguf as gguf_source
from .architecture import check_architecture
from .config import CONFIG_NAME, one_line, read_config, refuse_adapter
from .gguf_file import model_name
from .quantized import check_quantization

BUILTIN_PREFIX = "builtin:"


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]


# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_source(model: str, revision: str | None) -> Path:
    """The folder of a model: builtin, local, or downloaded from the hub; or its GGUF file, the first of several parts.

    Checks everything that is possible without loading weights. Raises: SourceError.
    """
    folder = _builtin(model) if model.startswith(BUILTIN_PREFIX) else Path(model)
    file = gguf_source.gguf_in(folder) if folder.is_dir() else folder if gguf_source.is_gguf(folder) else None
    if revision is not None and (folder.is_dir() or file is not None):
        what = "folder" if folder.is_dir() else "file"
        raise SourceError(f"a revision was given, but {model} is a local {what}: leave --revision out")
    if file is not None:
        return gguf_source.check_gguf(file)
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
            raise SourceError(
                f"{model} is neither a folder nor a GGUF file: give a model folder, a GGUF file, a hub id such as "
                "owner/name, or builtin:tales"
            )
        folder = _download(model, revision)
    refuse_adapter(folder)
    config = read_config(folder)
    check_architecture(folder / CONFIG_NAME, config)
    _check_weights(folder)
    check_quantization(folder, config)
    return folder


def short_name(model: str) -> str:
    """A short name of a model: the last part of the user's name for it; for "." the folder's name; for a folder in the
    hub's cache, which is named by a commit, the name on the hub."""
    name = model.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    if Path(model).is_dir():
        folder = Path(model).absolute()
        name = folder.resolve().name if name in ("", ".", "..") else name
        cached = folder.parent.parent.name
        if folder.parent.name == "snapshots" and cached.startswith("models--"):
            name = cached.rsplit("--", 1)[-1]
    return model_name(Path(name)) if name.lower().endswith(gguf_source.SUFFIX) else name


def _builtin(model: str) -> Path:
    root = Path(str(resources.files("edgelm.export"))) / "builtin"
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    name = model.removeprefix(BUILTIN_PREFIX)
    if name not in names:
        raise SourceError(
            f"no model {name!r} comes with edgelm: there is {', '.join(BUILTIN_PREFIX + item for item in names)}"
        )
    return root / name


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{model} is not a folder here and cannot be fetched from the hub ({one_line(error)}): check the name, the "
            "revision and the connection"
        ) from error


def _check_weights(folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise SourceError(
                    f"{path} is a pointer of Git LFS, not the weights: run  git lfs pull  in its folder, or download "
                    "the file itself"
                )
    if weights:
        return
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise SourceError(
            f"{folder} has its weights as pickle only ({pickled[0]}), which can run code when read: "
            "convert them to safetensors (model.save_pretrained does) where you trust them"
        )
    raise SourceError(f"{folder} holds no *.safetensors: give a folder with weights")
