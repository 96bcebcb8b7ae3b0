"""The training loop of all steps: rows of a text, a loss, AdamW, evaluations on held-out text, checkpoints.

It uses Hugging Face accelerate, so the same code runs on a CPU, on a GPU and in several processes. Rows and random
numbers depend only on the seed and the step: the same seed on the same CPU gives the same weights, also if the
training was interrupted and resumed from a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...errors import RecipeError
from ..disk import require_bytes
from ..progress import Clock, Say
from .checkpoint import Checkpoint, State
from .held_out import HeldOut, better
from .precision import Precision, products_in
from .schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

Shared = TypeVar("Shared")

_BETAS, _LARGEST_GRADIENT = (0.9, 0.95), 1.0
_PATIENCE = timedelta(hours=6)
_SHOWN = 10  # losses averaged in a progress line
# Seconds a token of forward and backward, in those of a forward pass in float32, for the first estimate.
_LEARNING: dict[Precision, float] = {"float32": 3, "bfloat16": 1.5}
# A checkpoint holds the weights, AdamW's two moments and the best weights so far, in float32.
_KEPT_BYTES = 4 * 4


@dataclass(frozen=True)
class Place:
    """Environment of a training. say: receives progress lines; hold: creates the held-out evaluation when it is needed,
    None without held-out text and in all processes but the first."""

    checkpoint: Checkpoint
    accelerator: Accelerator
    say: Say
    hold: Callable[[], HeldOut | None]


class Loop:
    """One training, from its checkpoint, if any, to its last step."""

    def __init__(
        self,
        step: Schedule,
        student: torch.nn.Module,
        loss: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
        place: Place,
        zeros: Mapping[str, torch.Tensor],
    ) -> None:
        """zeros: parameter name -> mask of the weights that stay zero."""
        self._step, self._student, self._loss = step, student, loss
        self._checkpoint, self._hold = place.checkpoint, place.hold
        self._held: HeldOut | None = None
        self._accelerator = accelerator = place.accelerator
        self._say = place.say if accelerator.is_main_process else lambda _: None
        student.train().to(accelerator.device)
        self._weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        self._zeros = {name: where.to(accelerator.device) for name, where in zeros.items()}
        self._optimizer = torch.optim.AdamW(self._weights.values(), betas=_BETAS, weight_decay=0.0, fused=True)
        self._best: dict[str, torch.Tensor] = {}
        self._precision: Precision = "float32"

    def run(self, token_ids: torch.Tensor, length: int) -> State:
        """Train, and return the final state. The student then has the kept weights: the best or the last ones."""
        state, self._best = self._checkpoint.load(self._weights, self._optimizer)
        if state.best == len(state.losses):  # the checkpoint stores weights that are best and last once
            self._best = self._copied()
        self._agree(len(state.losses))
        # A resumed training goes on in the precision that it started with, and all processes use the first one's.
        state.precision = self._precision = self._shared(
            state.precision or self._step.precision_on(self._accelerator.device)
        )
        if state.losses:
            self._say(f"resumed after step {len(state.losses)} of {self._step.steps} from {self._checkpoint.path}")
        if not state.done:
            self._require_room()
            self._held = self._hold()
            self._go_on(state, token_ids, length)
        self._student.cpu().eval()
        return state

    def _go_on(self, state: State, token_ids: torch.Tensor, length: int) -> None:
        first, steps = len(state.losses), self._step.steps
        guess = self._read(state) if first == 0 else None
        model, optimizer = self._accelerator.prepare(self._student, self._optimizer)
        tokens = self._step.batch * length
        clock = Clock(steps, first, None if guess is None else guess * tokens * _LEARNING[self._precision])
        self._tell(clock, state)
        for index in range(first, steps):
            rows = rows_of(token_ids, length, self._step, index)
            state.losses.append(self._take(index, model, optimizer, rows))
            if self._step.due(index + 1):
                self._read(state)
            state.done = index + 1 == steps or self._is_in_vain(state)
            self._tell(clock, state)
            self._keep(state)
            if state.done:
                return

    def _take(self, index: int, model: torch.nn.Module, optimizer: Any, rows: torch.Tensor) -> float:
        accelerator = self._accelerator
        torch.manual_seed((self._step.seed << 20) + index * accelerator.num_processes + accelerator.process_index)
        mine = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        with products_in(self._precision, accelerator.device):
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

    def _read(self, state: State) -> float | None:
        """Evaluate, add a point to the curve, and copy the weights if they are the best so far. Returns the seconds a
        token that the evaluation took, None if this process did not evaluate."""
        done = len(state.losses)
        since = state.curve[-1]["step"] if state.curve else 0
        point: dict[str, Any] = {"step": done}
        if done > since:
            point["loss"] = mean_of(state.losses[since:])
        started = time.monotonic()
        point |= self._shared({} if self._held is None else self._held.read(self._student))
        seconds = time.monotonic() - started
        state.curve.append(point)
        if "kl" not in point:
            return None
        if not math.isfinite(point["held_out_loss"]):
            raise RecipeError(self._diverged(done, math.nan))
        best = next((item for item in state.curve if item["step"] == state.best), None)
        if self._step.kept != "last" and better(point, best, self._step.kept):
            state.best = done
            self._best = self._copied()
        return None if self._held is None else seconds / self._held.tokens

    def _copied(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}

    def _shared(self, value: Shared) -> Shared:
        """The first process's value, so that all processes decide alike."""
        if self._accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def _is_in_vain(self, state: State) -> bool:
        """Whether the last `patience` evaluations were no better than an earlier one."""
        patience = self._step.patience
        if patience is None or state.best < 0:
            return False
        worse = [point for point in state.curve if point["step"] > state.best]
        return len(worse) >= patience

    def _keep(self, state: State) -> None:
        """Write a checkpoint if one is due. The last one holds the kept weights."""
        done = len(state.losses)
        if state.done:
            self._finish(state)
        if self._accelerator.is_main_process and (state.done or done % self._step.checkpoint_every == 0):
            best = {} if state.done or state.best == done else self._best
            self._checkpoint.save(self._weights, best, None if state.done else self._optimizer, state)

    def _finish(self, state: State) -> None:
        if self._best and state.best != len(state.losses):
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(self._best[name])
        if self._held is not None:
            state.samples = self._held.samples(self._student)

    def _tell(self, clock: Clock, state: State) -> None:
        done, steps = len(state.losses), self._step.steps
        line = clock.line(done)
        if line is None and not state.done:
            return
        loss = f", loss {mean_of(state.losses[-_SHOWN:]):.3f}" if done else ""
        point = next((point for point in reversed(state.curve) if "kl" in point), None)
        held = "" if point is None else f", held-out loss {point['held_out_loss']:.3f}, KL {point['kl']:.4f}"
        early = f", stopped early: no improvement since step {state.best}" if state.done and done < steps else ""
        self._say(f"step {done} of {steps}{loss}{held}{early or line or ''}")

    def _diverged(self, done: int, mean: float) -> str:
        """The error message. done: steps that changed weights; mean: the loss."""
        if done == 0:
            return (
                "the loss or its gradient is not a finite number in the first step, before any weight was changed: "
                "the model that the earlier steps produced, or the teacher, does not work with this text"
            )
        path = self._checkpoint.path
        kept = f"the last good weights are in {path}" if path.is_file() else "there is no checkpoint"
        what = "the loss" if not math.isfinite(mean) else "its gradient"
        return (
            f"{what} is no longer a finite number after step {done} of {self._step.steps}, and {kept}: compress with "
            "a lower learning_rate or a longer warmup, to another --out"
        )

    def _require_room(self) -> None:
        """Raise OutputError if the disk has no room for a checkpoint."""
        if self._accelerator.is_main_process:
            count = sum(weight.numel() for weight in self._weights.values())
            require_bytes(count * _KEPT_BYTES, self._checkpoint.path.parent, "a checkpoint of the training")

    def _agree(self, done: int) -> None:
        """Raise RecipeError unless all processes start from the same step."""
        found = self._accelerator.gather(torch.tensor([done], device=self._accelerator.device)).tolist()
        if len(set(found)) > 1:
            raise RecipeError(
                f"the processes found checkpoints of different steps ({', '.join(map(str, found))}) in "
                f"{self._checkpoint.path.parent}: use a folder that all machines share, or remove this one"
            )


def rows_of(token_ids: torch.Tensor, length: int, step: Schedule, index: int) -> torch.Tensor:
    """The batch of a step: windows at random positions of the text, (batch, length + 1) int64."""
    chance = torch.Generator().manual_seed((step.seed << 20) + index)
    starts = torch.randint(len(token_ids) - length, (step.batch, 1), generator=chance)
    return token_ids[starts + torch.arange(length + 1)]


def pace(step: Schedule, index: int) -> float:
    """Factor of the learning rate at a step: linear warmup, then half a cosine down to 0."""
    rising = max(1, round(step.warmup * step.steps))
    if index < rising:
        return (index + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (index + 1 - rising) / (step.steps + 1 - rising)))


def make_accelerator(step: Schedule) -> Accelerator:
    """Data parallel. One process and several give the same numbers up to the order of sums. Raises:
    RecipeError."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    # The first process measures between two training steps, for longer than accelerate's default timeout.
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    # In a mixture of experts, an expert that no token chose has no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused, patience])
    kind, count = accelerator.distributed_type, accelerator.num_processes
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RecipeError(f"accelerate was launched with {kind.value}, but each process must hold the whole model")
    step.require_shares(count)
    return accelerator


def mean_of(values: Sequence[float]) -> float:
    """Mean, rounded to four decimals; 0 for no values."""
    return round(math.fsum(values) / max(1, len(values)), 4)
