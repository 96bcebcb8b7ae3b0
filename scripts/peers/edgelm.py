"""edgelm itself, in the environment of the script; variants: the type of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgelm.runtime import Engine
from edgelm.runtime import load as load_bundle

FILES = ("model.onnx", "model.onnx.data")


def convert(model: Path, folder: Path, variant: str) -> None:
    from edgelm.export import ExportConfig, export_model

    export_model(ExportConfig(str(model), kv=variant, out=folder))
    load_bundle(folder).close()  # prepares the weights, as the first load on a machine does


class Loaded:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        # No guesses: what repeats itself behind a made-up prompt says nothing about real texts.
        for chunk in self._engine.stream(token_ids=ids, max_tokens=count, min_tokens=count, lookup=False):
            yield from chunk.token_ids


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    return Loaded(load_bundle(folder, threads=threads, response_cache=False, prefix_cache=False))
