"""onnxruntime-genai with a model made by its own builder; variants: the builder's precisions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

FILES = ("model.onnx", "model.onnx.data")


def convert(model: Path, folder: Path, variant: str) -> None:
    # By default, embedding and head share weights if the model ties them. Logits of only the last token are faster, and
    # enough for generating.
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder)]
    command += ["-p", variant, "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", "prune_lm_head=true"]
    subprocess.run(command, check=True)


class Loaded:
    def __init__(self, model: og.Model, capacity: int) -> None:
        self._model = model
        self._capacity = capacity

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        parameters = og.GeneratorParams(self._model)
        # A minimum length prevents end tokens.
        parameters.set_search_options(max_length=self._capacity, min_length=len(ids) + count, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, ids: list[int]) -> Any:
        # The graph returns only the last row of a step, so every token is a step, as in an answer.
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._capacity, do_sample=False)
        generator = og.Generator(self._model, parameters)
        rows = []
        for token in ids:
            generator.append_tokens([token])
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        return np.stack(rows)

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._capacity, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(ids)
        tokens: list[int] = []
        while len(tokens) < count and not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                break
            tokens.append(token)
        return tokens


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    config = og.Config(str(folder))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    return Loaded(og.Model(config), capacity)
