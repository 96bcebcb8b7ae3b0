"""edgelm itself, in the script's environment.

Variants: the type of the KV cache ("int8", "float32"); with an INT8 cache, all matrices in 4 bits ("4bits"), or a
bundle of so many bits for each parameter ("5.4bits"); and each of them with the compiled kernels ("int8+kernels").
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.runtime import Engine
from edgelm.runtime import load as load_bundle
from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.loading import open_folder
from edgelm.runtime.sessions.protocol import Session
from edgelm.targets.abilities import MIXED_SCHEME

FILES = ("model.onnx", "model.onnx.data")
_PIECE = 128
# A comparison says what weights of few bits lose; the gate need not.
_ANY_LOSS = 9.0


def convert(model: Path, folder: Path, variant: str) -> None:
    from edgelm.export import ExportConfig, export_model

    _switch(variant)
    form = variant.partition("+")[0]
    if form == "4bits":
        config = ExportConfig(str(model), scheme=MIXED_SCHEME, max_kl=_ANY_LOSS, out=folder)
    elif form.endswith("bits"):
        config = ExportConfig(str(model), bits=float(form.removesuffix("bits")), max_kl=_ANY_LOSS, out=folder)
    else:
        config = ExportConfig(str(model), kv=form, out=folder)
    export_model(config)


def _switch(variant: str) -> None:
    wanted = variant.endswith("+kernels")
    os.environ[kernels.SWITCH] = "on" if wanted else "off"
    if wanted and kernels.identity() is None:
        raise RuntimeError("edgelm-kernels is not installed, or not for this processor: pip install ./kernels")


class Loaded:
    def __init__(self, engine: Engine, folder: Path, threads: int) -> None:
        self._engine = engine
        self._folder, self._threads = folder, threads
        self._session: Session | None = None

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        # No draft tokens: repetition after a made-up prompt says nothing about real texts.
        for chunk in self._engine.stream(token_ids=ids, max_tokens=count, min_tokens=count, lookup=False):
            yield from chunk.token_ids

    def logits(self, ids: list[int]) -> Any:
        if self._session is None:
            _, self._session = open_folder(self._folder, self._threads)
        self._session.rewind(0)
        pieces = [ids[begin : begin + _PIECE] for begin in range(0, len(ids), _PIECE)]
        return np.concatenate([self._session.step(piece, len(piece)).copy() for piece in pieces])

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        found = list(self._engine.generate(token_ids=ids, max_tokens=count, lookup=False).token_ids)
        return list(itertools.takewhile(lambda token: token not in ends, found))


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    _switch(variant)
    engine = load_bundle(folder, threads=threads, response_cache=False, prefix_cache=False)
    return Loaded(engine, folder, threads)
