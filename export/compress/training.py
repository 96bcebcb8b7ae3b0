"""The one training loop: rows of a text, a loss, AdamW, checkpoints. What is learned is the loss's business.

It runs through Hugging Face accelerate, so the same code serves a CPU, a GPU, and the processes that `accelerate
launch` started. Every row and every random number is a function of the seed and the step: the same seed on the same
machine gives the same weights, also where the training was interrupted and went on from a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RecipeError
from .checkpoint import Checkpoint, identify
from .schedule import Schedule
from .steps import Workbench

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from transformers import PreTrainedModel

# Of a model, and rows (rows, length + 1) int64 of which the last token is only predicted; returns the mean over tokens.
Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

_BETAS, _LARGEST_GRADIENT = (0.9, 0.95), 1.0
_SAY_EVERY_S = 5.0
_PATIENCE = timedelta(hours=6)
_PRUNED_SHARE = 0.01
_SHOWN = 10  # losses that the figures of a step are a mean of


def next_token(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token given those before it."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def distillation(teacher: torch.nn.Module, temperature: float, alpha: float) -> Loss:
    """alpha * T^2 * KL(teacher || student), both softened by T, + (1 - alpha) * cross-entropy (Hinton et al., arXiv
    1503.02531). The factor T^2 keeps the gradient's size when T changes."""

    def loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1).float()
        hard = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        with torch.no_grad():
            wanted = teacher.to(rows.device)(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1).float()
        soft = torch.nn.functional.kl_div(
            torch.log_softmax(logits / temperature, -1),
            torch.log_softmax(wanted / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        return alpha * temperature**2 * soft + (1 - alpha) * hard

    return loss


def train(
    step: Schedule, student: torch.nn.Module, module: PreTrainedModel, loss: Loss, bench: Workbench, *others: Path
) -> dict[str, Any]:
    """Train the parameters of a student that ask for gradients, in place. Returns figures for the step's details.

    student: `module`, or what stands around it; others: folders of further models that the loss needs. Afterwards it is
    on the CPU and in evaluation mode. Weights that were pruned to zero stay zero. Raises: RecipeError for a text, a
    checkpoint or processes that do not fit, and for a loss that is not a finite number.
    """
    token_ids = step.read_tokens(bench)
    length = step.row_length(bench.context_length)
    checkpoint = Checkpoint(bench.checkpoints, identify(step, module, token_ids, bench, *others))
    with torch.random.fork_rng():
        losses = _Loop(step, student, loss, checkpoint, bench.say).run(torch.tensor(token_ids), length)
    return {
        "tokens": step.steps * step.batch * length,
        "trained": sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
        "first-loss": _mean(losses[:_SHOWN]),
        "last-loss": _mean(losses[-_SHOWN:]),
    }


class _Loop:
    """One training, from wherever its checkpoint stands to its last step."""

    def __init__(
        self,
        step: Schedule,
        student: torch.nn.Module,
        loss: Loss,
        checkpoint: Checkpoint,
        say: Callable[[str], None],
    ) -> None:
        self._step, self._student, self._loss, self._checkpoint = step, student, loss, checkpoint
        self._accelerator = _accelerator(step.batch)
        self._say = say if self._accelerator.is_main_process else lambda _: None
        student.train().to(self._accelerator.device)
        self._weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        self._zeros = zeros_of(self._weights)
        self._optimizer = torch.optim.AdamW(self._weights.values(), betas=_BETAS, weight_decay=0.0)

    def run(self, token_ids: torch.Tensor, length: int) -> list[float]:
        """Returns the loss of every step."""
        losses = self._checkpoint.load(self._weights, self._optimizer)
        self._agree(len(losses))
        if losses:
            self._say(f"goes on after step {len(losses)} of {self._step.steps}, from {self._checkpoint.path}")
        model, optimizer = self._accelerator.prepare(self._student, self._optimizer)
        clock = _Clock(len(losses), self._step.steps)
        for index in range(len(losses), self._step.steps):
            losses.append(self._take(index, model, optimizer, rows_of(token_ids, length, self._step, index)))
            self._keep(losses)
            clock.tell(losses, self._say)
        self._student.cpu().eval()
        return losses

    def _take(self, index: int, model: torch.nn.Module, optimizer: Any, rows: torch.Tensor) -> float:
        accelerator = self._accelerator
        torch.manual_seed((self._step.seed << 20) + index * accelerator.num_processes + accelerator.process_index)
        mine = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        value = self._loss(model, mine)
        mean = float(accelerator.reduce(value.detach(), "mean"))
        accelerator.backward(value)
        gradient = accelerator.clip_grad_norm_(list(self._weights.values()), _LARGEST_GRADIENT)
        if not math.isfinite(mean) or not math.isfinite(float(gradient)):
            raise RecipeError(self._diverged(index, mean))
        for group in self._optimizer.param_groups:
            group["lr"] = self._step.learning_rate * pace(self._step, index)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, where in self._zeros.items():
                self._weights[name].masked_fill_(where, 0)
        return mean

    def _keep(self, losses: list[float]) -> None:
        last = len(losses) == self._step.steps
        if self._accelerator.is_main_process and (last or len(losses) % self._step.checkpoint_every == 0):
            self._checkpoint.save(self._weights, None if last else self._optimizer, losses)

    def _diverged(self, index: int, mean: float) -> str:
        path = self._checkpoint.path
        kept = f"the last good weights are in {path}" if path.is_file() else "nothing was kept before that"
        what = "the loss" if not math.isfinite(mean) else "its gradient"
        return (
            f"{what} is no longer a finite number at step {index + 1} of {self._step.steps}, and {kept}: compress with "
            "a lower learning_rate or a longer warmup, to another place"
        )

    def _agree(self, done: int) -> None:
        """All processes go on from the same step."""
        found = self._accelerator.gather(torch.tensor([done], device=self._accelerator.device)).tolist()
        if len(set(found)) > 1:
            raise RecipeError(
                f"processes found checkpoints of unlike steps ({', '.join(map(str, found))}) in "
                f"{self._checkpoint.path.parent}: use a folder that all machines share, or remove it"
            )


def zeros_of(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where matrices are zero because they were pruned, by their names: 1 % of the values or more, but not all. These
    stay zero."""
    found = {name: weight == 0 for name, weight in weights.items() if weight.dim() == 2}
    return {name: where for name, where in found.items() if _PRUNED_SHARE <= float(where.float().mean()) < 1}


def rows_of(token_ids: torch.Tensor, length: int, step: Schedule, index: int) -> torch.Tensor:
    """The batch of a step, of windows that begin anywhere in the text: (batch, length + 1) int64."""
    chance = torch.Generator().manual_seed((step.seed << 20) + index)
    starts = torch.randint(len(token_ids) - length, (step.batch, 1), generator=chance)
    return token_ids[starts + torch.arange(length + 1)]


def pace(step: Schedule, index: int) -> float:
    """The share of the learning rate at a step: a linear rise, then half a cosine down to 0."""
    rising = max(1, round(step.warmup * step.steps))
    if index < rising:
        return (index + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (index + 1 - rising) / (step.steps + 1 - rising)))


class _Clock:
    """Says how far a training is, and about how long it still takes."""

    def __init__(self, done: int, steps: int) -> None:
        self._first, self._steps = done, steps
        self._started = self._told = time.monotonic()

    def tell(self, losses: Sequence[float], say: Callable[[str], None]) -> None:
        """Say a line after the first step, the last one, and every five seconds."""
        done, now = len(losses), time.monotonic()
        if done not in (self._first + 1, self._steps) and now - self._told < _SAY_EVERY_S:
            return
        self._told = now
        left = (now - self._started) / (done - self._first) * (self._steps - done)
        say(f"step {done} of {self._steps}, loss {_mean(losses[-_SHOWN:]):.3f}, about {_duration(left)} left")


def _accelerator(batch: int) -> Accelerator:
    """Data parallel, float32: the same numbers on one process and on several, but for the order of sums."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    # One process may measure, between two steps that train, for longer than accelerate lets the others wait.
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    # A mixture of experts leaves the experts that no token chose without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused, patience])
    kind, count = accelerator.distributed_type, accelerator.num_processes
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RecipeError(f"accelerate was launched with {kind.value}, but each process must hold the whole model")
    if batch % count:
        raise RecipeError(f"batch is {batch}, which {count} processes cannot share: take a multiple of {count}")
    return accelerator


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / max(1, len(values)), 4)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
