"""Bundles on disk: open a folder, check that it is what its manifest says. Knows no onnxruntime and no tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleCorruptError, BundleMissingError
from ..host import files
from .manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
GENERATION_CONFIG_NAME = "generation_config.json"
REPORT_NAME = "report.json"
REPORT_PAGE_NAME = "report.html"

_REQUIRED = (GRAPH_NAME, TOKENIZER_NAME)
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest that was read. Immutable, safe between threads.

    The files' contents are checked by `check_files`, not by `open`, so that the caller decides when to pay for it.
    has_manifest: False for the folder of another exporter, whose manifest was made from what is in it. exact: whether
    whether the caller insists on equal bits (`cuts`).
    """

    path: Path
    manifest: Manifest
    has_manifest: bool = True
    exact: bool = True

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Read the manifest and check that each file that it names is there and has the size that it names.

        Cost: a few small reads. Raises: BundleMissingError, BundleCorruptError, BundleVersionError.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleMissingError(f"{folder} is not a folder: give the folder that  edgelm export  wrote")
        if not (folder / MANIFEST_NAME).is_file():
            raise BundleMissingError(f"{folder} holds no {MANIFEST_NAME}: give a folder that  edgelm export  wrote")
        bundle = Bundle(folder, parse_manifest(_read_text(folder / MANIFEST_NAME)))
        for name in _REQUIRED:
            if name not in bundle.manifest.files:
                raise BundleCorruptError(f"{folder / MANIFEST_NAME} lists no {name}: export the bundle again")
        for name, entry in bundle.manifest.files.items():
            bundle._check_size(name, entry)
        return bundle

    def check_files(self, names: Iterable[str]) -> None:
        """Compare the digests of the named files with the manifest. Reads them whole, about 1 GB/s on a laptop.

        Raises: BundleCorruptError for the first file that differs, BundleMissingError for one that cannot be read.
        """
        for name in names:
            found = file_digest(self.path / name)
            if found != self.manifest.files[name].sha256:
                raise BundleCorruptError(
                    f"{self.path / name} was changed after the export (its digest is {found[:23]}..., the manifest "
                    f"says {self.manifest.files[name].sha256[:23]}...): copy or export the bundle again"
                )

    def read_text(self, name: str) -> str | None:
        """The text of a listed file, or None where the bundle has no such file. Raises: BundleCorruptError."""
        return _read_text(self.path / name) if name in self.manifest.files else None

    def total_bytes(self) -> int:
        """The size of all files that the manifest lists, in bytes."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def _check_size(self, name: str, entry: FileEntry) -> None:
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise BundleCorruptError(f"{MANIFEST_NAME}: {name!r} is not a plain file name")
        try:
            files.require_regular(self.path / name)
            size = (self.path / name).stat().st_size
        except OSError as error:
            raise BundleMissingError(
                f"{self.path / name} cannot be read ({error.strerror}): copy or export the bundle again"
            ) from error
        if size != entry.bytes:
            raise BundleCorruptError(
                f"{self.path / name} has {size:,} bytes, the manifest says {entry.bytes:,}: "
                "copy or export the bundle again"
            )


def file_digest(path: Path) -> str:
    """ "sha256:" and the SHA-256 of a file's bytes in hexadecimal. Raises: BundleMissingError."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with files.open_regular(path) as file:
            while count := file.readinto(chunk):  # type: ignore[attr-defined]
                digest.update(chunk[:count])
    except OSError as error:
        raise BundleMissingError(
            f"{path} cannot be read ({error.strerror}): copy or export the bundle again"
        ) from error
    return "sha256:" + digest.hexdigest()


def _read_text(path: Path) -> str:
    try:
        return files.read_text(path, files.MODEL_TEXT_BYTES)
    except files.UnfitFileError as error:
        raise BundleCorruptError(f"{path}: {error.strerror}: copy or export the bundle again") from error
    except OSError as error:
        raise BundleMissingError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
