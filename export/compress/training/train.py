"""Losses of the training steps, and `train`, which runs the loop of `loop.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..progress import telling
from ..step import Workbench
from .checkpoint import Checkpoint, State, identify
from .divergence import Mix, divergence
from .held_out import HeldOut
from .loop import Loop, Place, make_accelerator, mean_of, rows_of
from .precision import products_in
from .schedule import Schedule
from .texts import TrainingTexts
from .zeros import pruned_zeros, was_pruned

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Arguments: model; rows (rows, length + 1) int64, whose last token is only predicted. Returns the mean over tokens.
Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

_SHOWN = 10  # losses averaged in first-loss and last-loss


def next_token(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each token given the tokens before it, in nats. rows: (rows, length + 1) int64."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def distillation(teacher: torch.nn.Module, temperature: float, alpha: float) -> Loss:
    """The loss of a distillation, see `divergence`."""
    mix = Mix(temperature, alpha)

    def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        said = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            wanted = teacher.to(rows.device)(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
        return divergence(said, wanted, rows[:, 1:].flatten(), mix)

    return loss


def train(
    step: Schedule,
    student: torch.nn.Module,
    module: PreTrainedModel,
    loss: Loss,
    bench: Workbench,
    *others: Path,
    within: AbstractContextManager[Any] | None = None,
    more: Sequence[int] = (),
) -> dict[str, Any]:
    """Train, in place, the student's parameters that require gradients. Returns figures for the step's details, with
    curve and samples under `training`.

    student: `module` or a wrapper of it; others: folders of further models that the loss needs; within: context that
    the student computes in during evaluations; more: token ids to train on after the text. The student ends on the CPU,
    in evaluation mode. Weights that `prune-magnitude` set to zero stay zero. Raises: RecipeError if a text, a
    checkpoint or the number of processes does not fit, or if the loss is not finite; OutputError if a checkpoint cannot
    be written.
    """
    texts, length = step.read_texts(bench), step.row_length(bench.context_length)
    sizes = {
        "tokens": step.steps * step.batch * length,
        "trained": sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
    }
    if bench.rehearsal:
        return {**sizes, "training": {"seconds": _estimate(step, student, loss, texts, length)}}
    checkpoint = Checkpoint(bench.checkpoints, identify(step, module, texts, bench, *others))
    zeros = pruned_zeros(student) if was_pruned(bench.before, others) else {}
    accelerator = make_accelerator(step)
    with torch.random.fork_rng(), telling(lambda _: None):  # the loop reports its own progress
        place = Place(checkpoint, accelerator, bench.say, lambda: _held_out(step, texts, bench, within, accelerator))
        state = Loop(step, student, loss, place, zeros).run(torch.tensor([*texts.training, *more]), length)
    return {
        **sizes,
        "precision": state.precision,
        "first-loss": mean_of(state.losses[:_SHOWN]),
        "last-loss": mean_of(state.losses[-_SHOWN:]),
        "training": _told(step, state, texts, bench),
    }


def _held_out(
    step: Schedule, texts: TrainingTexts, bench: Workbench, within: AbstractContextManager[Any] | None, accelerator: Any
) -> HeldOut | None:
    """The held-out evaluation; None without held-out text and in all processes but the first."""
    if not texts.held_out or not accelerator.is_main_process:
        return None
    bench.say(f"evaluating the source on {len(texts.held_out) - 1} held-out tokens")
    source: Any = bench.reference()
    source.to(accelerator.device)
    return HeldOut(texts.held_out, source, bench, within=within, samples=step.samples)


def _told(step: Schedule, state: State, texts: TrainingTexts, bench: Workbench) -> dict[str, Any]:
    """Curve, samples and held-out text of a training, as plain data for the report."""
    decode: Any = bench.tokenizer.decode
    told: dict[str, Any] = {
        "held_out": texts.origin,
        "held_out_tokens": max(0, len(texts.held_out) - 1),
        "curve": state.curve,
        "kept_step": len(state.losses) if state.best < 0 else state.best,
        "samples": [{name: decode(ids) for name, ids in sample.items()} for sample in state.samples],
    }
    if len(state.losses) < step.steps:
        told["stopped_after"] = len(state.losses)
    return told


def _estimate(step: Schedule, student: torch.nn.Module, loss: Loss, texts: TrainingTexts, length: int) -> float:
    """Estimated seconds of the training on this machine, from one batch forward and backward and one row forward.
    Changes no weights."""
    rows = rows_of(torch.tensor(texts.training), length, step, 0)
    row = rows[:1]
    _learn(step, student, loss, row)  # the first pass is slower
    started = time.monotonic()
    _learn(step, student, loss, rows)
    learned = time.monotonic() - started
    started = time.monotonic()
    with torch.no_grad():
        next_token(student, row)
    read = (time.monotonic() - started) * len(texts.held_out) / length
    readings = sum(step.due(done) for done in range(1, step.steps + 1)) + 2 if texts.held_out else 0
    return step.steps * learned + readings * read


def _learn(step: Schedule, student: torch.nn.Module, loss: Loss, rows: torch.Tensor) -> None:
    """Compute gradients, and drop them."""
    with products_in(step.precision_on(rows.device), rows.device):
        value = loss(student, rows)
    value.backward()  # type: ignore[no-untyped-call]
    student.zero_grad()
