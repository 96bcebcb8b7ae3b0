"""Make weights for bundles without weights, and list their files in their manifests.

python scripts/gpu/random_weights.py FOLDER...
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgelm.runtime.bundle.folder import GRAPH_NAME, WEIGHTS_NAME, file_digest
from edgelm.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, parse_manifest

_POOL = 1 << 24
_BLOCK = 32


def main() -> None:
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    for folder in map(Path, sys.argv[1:]):
        fill(folder, pool)
        print(folder, (folder / WEIGHTS_NAME).stat().st_size)


def fill(folder: Path, pool: NDArray[np.float32]) -> None:
    """Write each external tensor of a graph at its offset, then the manifest's list of files. pool: normal numbers."""
    graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
    bits = min((item.i for node in graph.node for item in node.attribute if item.name == "bits"), default=16)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        for tensor in graph.initializer:
            place = {item.key: item.value for item in tensor.external_data}
            if place:
                file.seek(int(place["offset"]))
                file.write(memoryview(_weights(tensor, bits, pool)).cast("B"))
    path = folder / MANIFEST_NAME
    manifest = parse_manifest(path.read_text(encoding="utf-8"))
    names = sorted(item.name for item in folder.iterdir() if item.name != MANIFEST_NAME)
    files = {name: FileEntry((folder / name).stat().st_size, file_digest(folder / name)) for name in names}
    path.write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")


def _weights(tensor: Any, bits: int, pool: NDArray[np.float32]) -> NDArray[Any]:
    """Weights that keep the magnitude of activations: quantized values use the whole range, and scales are small."""
    shape, name = tuple(tensor.dims), tensor.name
    if tensor.data_type == onnx.TensorProto.UINT8:
        if ".zero" in name or ".middle" in name:
            return np.full(shape, 0x88 if bits == 4 else 0x80, np.uint8)
        return np.resize(pool.view(np.uint8), shape)
    if ".scale" in name:
        deviation = 2**bits / np.sqrt(12)
        return np.full(shape, 1 / deviation / np.sqrt(_BLOCK * shape[1]), np.float16)
    return np.ascontiguousarray(np.resize(pool, shape) / np.sqrt(min(shape)), np.float16)


if __name__ == "__main__":
    main()
