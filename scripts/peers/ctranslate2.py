"""CTranslate2: its converter, and `generate_tokens`, whose first token stands behind the prompt in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import ctranslate2

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
        # A minimum length keeps end tokens away; one candidate is greedy.
        for result in self._generator.generate_tokens(words, max_length=count, min_length=count, sampling_topk=1):
            yield result.token_id


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
    )
    return Loaded(generator, json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
