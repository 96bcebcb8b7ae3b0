"""transformers with torch in float32, by a plain loop over the model, which is faster than its `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Nothing to convert: what the others were converted from stands beside their forms of it.
FILES = ("../model/*.safetensors",)


def convert(model: Path, folder: Path, variant: str) -> None:
    folder.mkdir(parents=True)


class Loaded:
    def __init__(self, module: Any) -> None:
        self._module = module

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        step, cache = torch.tensor([ids]), None
        for _ in range(count):
            output = self._module(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(step)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        return self._module(torch.tensor([ids])).logits[0].numpy()

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in ends, self.generate(ids, count)))


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    torch.set_num_threads(threads)
    return Loaded(AutoModelForCausalLM.from_pretrained(folder.with_name("model"), dtype=getattr(torch, variant)).eval())
