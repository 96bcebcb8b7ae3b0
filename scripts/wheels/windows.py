"""Run Windows' kernels in Wine: a C program loads onnxruntime's Windows build and runs a graph."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .build import FOLDER, ROOT, BuildError, run, tools, zig

_FOLDER = FOLDER / "windows"
_SOURCE = Path(__file__).with_name("run_graph.c")
_HEADERS = ROOT / "kernels" / "third_party" / "onnxruntime"
# ONNX's numbers for the types of graph inputs.
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}
_LIMIT_S = 300


def wine() -> str | None:
    """The Wine program, if it is installed."""
    return shutil.which("wine64") or shutil.which("wine") or shutil.which("/usr/lib/wine/wine64")


def compute(graph: Path, feeds: Mapping[str, NDArray[Any]], kernels: Path | None) -> bytes:
    """All outputs of a graph, concatenated, as computed on Windows. kernels: the DLL, None without.

    Raises: BuildError.
    """
    found = wine()
    if found is None:
        raise BuildError("wine is not here: Debian has it as wine64")
    inputs, outputs = _FOLDER / "inputs", _FOLDER / "outputs"
    program, library = _program(), _onnxruntime()
    inputs.write_bytes(_packed(feeds))
    outputs.unlink(missing_ok=True)
    words = [str(program), *map(_path, (library, kernels, graph, inputs, outputs))]
    settings = {"WINEPREFIX": str(_FOLDER / "prefix"), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [found, *words], env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S
    )
    if done.returncode or not outputs.is_file():
        raise BuildError(f"{program.name} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return outputs.read_bytes()


def _path(path: Path | None) -> str:
    """A path as Wine shows it to Windows programs."""
    return "-" if path is None else "Z:" + str(path.resolve()).replace("/", "\\")


def _packed(feeds: Mapping[str, NDArray[Any]]) -> bytes:
    """The inputs as run_graph.c reads them."""
    parts = [struct.pack("<i", len(feeds))]
    for name, array in feeds.items():
        encoded = name.encode()
        parts.append(struct.pack("<i", len(encoded)) + encoded)
        parts.append(struct.pack(f"<2i{array.ndim}q", _TYPES[array.dtype.name], array.ndim, *array.shape))
        parts.append(struct.pack("<q", array.nbytes) + array.tobytes())
    return b"".join(parts)


def _program() -> Path:
    """run_graph.c, compiled for Windows."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    made = _FOLDER / "run_graph.exe"
    if not made.is_file() or made.stat().st_mtime < _SOURCE.stat().st_mtime:
        compiler, environment = zig(tools())
        run([compiler, "cc", "-target", "x86_64-windows-gnu", "-O1", "-I", _HEADERS, "-o", made, _SOURCE], environment)
    return made


def _onnxruntime() -> Path:
    """onnxruntime.dll from the Windows wheel, in the version that edgelm was tested with."""
    library = _FOLDER / "onnxruntime" / "capi" / "onnxruntime.dll"
    if not library.is_file():
        options = ["--platform", "win_amd64", "--only-binary", ":all:", "--no-deps", "-c", ROOT / "constraints.txt"]
        run([tools(), "-m", "pip", "download", "--quiet", *options, "--dest", _FOLDER, "onnxruntime"])
        (wheel,) = _FOLDER.glob("onnxruntime-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(_FOLDER, [name for name in archive.namelist() if name.endswith(".dll")])
    return library
