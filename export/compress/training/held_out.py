"""Evaluation of a training on its held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..reading import Reader
from ..step import Workbench
from .schedule import Keep

if TYPE_CHECKING:
    pass

_PROMPT, _ANSWER = 16, 32  # tokens of a sample
_MOST_PASSAGES = 100  # each takes a pass of its own, so that 500 would take longer than the steps between evaluations


class HeldOut:
    """Evaluates a student on the held-out text.

    Cost: one forward pass of the source over the text; for each evaluation a pass of the student over the text and one
    over each of the first 100 LAMBADA passages, if any. Memory: see `Reader`.
    """

    def __init__(
        self,
        token_ids: list[int],
        source: torch.nn.Module,
        bench: Workbench,
        *,
        within: AbstractContextManager[Any] | None,
        samples: int,
    ) -> None:
        """source: reference of the KL divergence, not kept; within: context that the student computes in, such as the
        INT8 simulation; samples: number of sample prompts."""
        self._reader = Reader(token_ids, bench.context_length)
        self._passages = None if bench.passages is None else bench.passages.first(_MOST_PASSAGES)
        self._within = within or nullcontext()
        self._reader.expect(source)
        self._prompts = _prompts(token_ids, samples)
        self._said = _continued(source, self._prompts)

    @property
    def tokens(self) -> int:
        """Tokens that an evaluation predicts."""
        return self._reader.tokens

    def read(self, student: torch.nn.Module) -> dict[str, float]:
        """held_out_loss and kl, in nats a token, and with LAMBADA passages last_words_percent.

        The student is evaluated in evaluation mode and left in training mode.
        """
        student.eval()
        with self._within:
            reading = self._reader.read(student)
            found = {"held_out_loss": round(reading.loss, 5), "kl": round(reading.kl, 6)}
            if self._passages is not None:
                found["last_words_percent"] = round(100 * self._passages.accuracy(student), 2)
        student.train()
        return found

    def samples(self, student: torch.nn.Module) -> list[dict[str, list[int]]]:
        """Beginnings of held-out passages (`prompt`) and the continuations of `source` and student (`after`), as token
        ids."""
        student.eval()
        with self._within:
            said = _continued(student, self._prompts)
        names = ("prompt", "source", "after")
        each = zip(self._prompts.tolist(), self._said, said, strict=True)
        return [dict(zip(names, ids, strict=True)) for ids in each]


def better(point: dict[str, Any], best: dict[str, Any] | None, keep: Keep) -> bool:
    """Whether an evaluation is better than the best so far. keep: "kl" compares KL, all else the held-out loss."""
    key = "kl" if keep == "kl" else "held_out_loss"
    return best is None or bool(point[key] < best[key])


def _prompts(token_ids: list[int], count: int) -> torch.Tensor:
    """Passages evenly spread over a text, (up to count, up to 16) int64."""
    size = min(_PROMPT, len(token_ids))
    room = len(token_ids) - size
    starts = sorted({index * room // max(1, count) for index in range(count)})
    return torch.tensor([token_ids[start : start + size] for start in starts], dtype=torch.int64)


def _continued(module: Any, prompts: torch.Tensor) -> list[list[int]]:
    """Greedy continuation of each prompt. Each token takes a pass over the whole text: not every compressed model
    has a KV cache."""
    ids = prompts.to(next(module.parameters()).device)
    with torch.no_grad():
        for _ in range(_ANSWER if len(prompts) else 0):
            last = module(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    said: list[list[int]] = ids[:, prompts.shape[-1] :].tolist() if len(prompts) else []
    return said
