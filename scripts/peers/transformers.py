"""transformers with torch in float32, in a simple loop over the model, which is faster than its `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Nothing to convert: the source model is beside the other peers' forms of it.
FILES = ("../model/*.safetensors",)
# Prompts per batch.
_BATCH = 10


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

    def answers(self, prompts: list[list[int]], count: int, ends: list[int]) -> list[list[int]]:
        """Batches of prompts of similar length: float32 weights are four times as large as others', and one by one 80
        answers of 48 tokens take longer than everything else."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, list[int]] = {}
        for begin in range(0, len(order), _BATCH):
            batch = order[begin : begin + _BATCH]
            found.update(zip(batch, self._batch([prompts[index] for index in batch], count, ends), strict=True))
        return [found[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], count: int, ends: list[int]) -> list[list[int]]:
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        step = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        positions, cache, chosen = (mask.cumsum(1) - 1).clamp(min=0), None, []
        for _ in range(count):
            output = self._module(
                step,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            mask, positions = torch.cat([mask, torch.ones_like(step)], 1), positions[:, -1:] + 1
            chosen.append(step)
        rows = torch.cat(chosen, 1).tolist()
        return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    torch.set_num_threads(threads)
    return Loaded(AutoModelForCausalLM.from_pretrained(folder.with_name("model"), dtype=getattr(torch, variant)).eval())
