"""CTranslate2: its converter, and `generate_tokens`, which computes prompt and first token in one pass."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

FILES = ("model.bin",)


def convert(model: Path, folder: Path, variant: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(model)).convert(str(folder), quantization=variant, force=True)


class Loaded:
    def __init__(self, generator: ctranslate2.Generator, vocabulary: list[str]) -> None:
        self._generator = generator
        self._vocabulary = vocabulary

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        words = [self._vocabulary[token] for token in ids]
        # A minimum length prevents end tokens; one candidate means greedy.
        for result in self._generator.generate_tokens(words, max_length=count, min_length=count, sampling_topk=1):
            yield result.token_id

    def logits(self, ids: list[int]) -> Any:
        words = [self._vocabulary[token] for token in ids]
        return np.array(self._generator.forward_batch([words]))[0]

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        words = [self._vocabulary[token] for token in ids]
        found = (item.token_id for item in self._generator.generate_tokens(words, max_length=count, sampling_topk=1))
        return list(itertools.takewhile(lambda token: token not in ends, found))


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
    )
    return Loaded(generator, json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
