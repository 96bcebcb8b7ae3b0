"""What a training step keeps to go on from: one safetensors file, replaced as a whole.

    weight/NAME          a parameter that is trained
    best/NAME            the same when the held-out text was read best, if that was before
    exp_avg/NAME, ...    AdamW's moments and count of it; left out when the training is done
    metadata             JSON under `edgelm`: version, state, and digests of all that decides what is trained and how

Tensors and state are one file, so they never disagree. accelerate's own `save_state` is not used: it writes pickles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ....runtime.bundle.folder import file_digest
from ...errors import OutputError, RecipeError
from ..module.edits import edits_of
from ..recipe import step_settings
from ..step import Step, Workbench
from .texts import TrainingTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "training.safetensors"
_KEY, _VERSION = "edgelm", 2
# What a digest is of, in words for whoever changed it.
_PARTS = {
    "step": "settings of the step",
    "before": "the steps before it",
    "edits": "what the steps before it chose",
    "text": "the text to train on",
    "held_out": "the text that is held out",
    "choosing": "the text of the compression",
    "weights": "the model",
}

Parts = dict[str, str]


@dataclass
class State:
    """How far a training is. losses: of every step; curve: what `HeldOut.read` gave, and when; best: the step of the
    best reading so far, -1 for none; done: whether no step is left; samples: then, what the weights that stay say,
    see `HeldOut.samples`."""

    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: int = -1
    done: bool = False
    samples: list[dict[str, list[int]]] = field(default_factory=list)


class Checkpoint:
    """One step's place. Nothing is written before the first `save`."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        """parts: `identify`'s, without which a file that is there is not read."""
        self.path = folder / _NAME
        self._parts = parts

    def load(
        self, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[State, dict[str, torch.Tensor]]:
        """Put what was kept into the parameters and the optimizer. Returns the state, that of a beginning where
        nothing was kept, and the best weights, none where they are the last ones.

        Raises: RecipeError for a file of another step, recipe, text or model, and for one that is damaged; it stays as
        it is.
        """
        if not self.path.is_file():
            return State(), {}
        best: dict[str, torch.Tensor] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = _metadata(file)
                _compare(self.path, metadata, self._parts)
                with torch.no_grad():
                    for key in file.keys():  # noqa: SIM118, not a dict
                        kind, _, name = key.partition("/")
                        if kind == "best":
                            best[name] = file.get_tensor(key)
                        else:
                            _put(weights[name], kind, file.get_tensor(key), optimizer)
                return State(**metadata["state"]), best
        except _UNREADABLE as error:
            raise _damaged(self.path, error) from error

    def save(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        best: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
        state: State,
    ) -> None:
        """Replace the file. optimizer: None where no step is left. Raises: OutputError; the earlier file stays."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in weights.items()}
        tensors |= {f"best/{name}": weight for name, weight in best.items()}
        if optimizer is not None:
            for name, weight in weights.items():
                tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(weight, {}).items()}
        metadata = {"version": _VERSION, "parts": self._parts, "state": dataclasses.asdict(state)}
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        partial = self.path.with_name(f".{_NAME}.partial-{secrets.token_hex(8)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(plain, partial, metadata={_KEY: json.dumps(metadata)})
            partial.replace(self.path)
        except (OSError, SafetensorError) as error:  # safetensors says so of a full disk
            raise OutputError(self._not_written(len(state.losses), error)) from error
        finally:
            partial.unlink(missing_ok=True)

    def _not_written(self, step: int, error: Exception) -> str:
        kept = f"an earlier one is in {self.path}" if self.path.is_file() else "nothing was kept before"
        return (
            f"the checkpoint after step {step} cannot be written to {self.path.parent} ({error}), and {kept}: free "
            "some space, and the same command goes on from what was kept"
        )


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def identify(step: Step, module: PreTrainedModel, texts: TrainingTexts, bench: Workbench, *others: Path) -> Parts:
    """Digests of all that decides what a training gives: settings, the steps before it, texts, and weights.

    module: that is trained, before; others: folders of further models that take part. Cost: reading the weights once.
    """
    files = [path for folder in (bench.source, *others) for path in sorted(folder.glob("*.safetensors"))]
    return {
        **_known_ahead(step, texts, bench),
        "edits": _digest(edits_of(module)),
        "weights": _digest([file_digest(path) for path in files]),
    }


def check_ahead(step: Step, texts: TrainingTexts, bench: Workbench) -> None:
    """Before any step runs: is the checkpoint that is there, if any, this step's, as far as can be known? Raises:
    RecipeError."""
    path = bench.checkpoints / _NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            _compare(path, _metadata(file), _known_ahead(step, texts, bench))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _known_ahead(step: Step, texts: TrainingTexts, bench: Workbench) -> Parts:
    settings = {key: value for key, value in step_settings(step).items() if key != "checkpoint_every"}
    parts = {
        "step": settings,
        "before": bench.before,
        "text": texts.training,
        "held_out": texts.held_out,
        "choosing": list(bench.token_ids),
    }
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()}"


def _metadata(file: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    return metadata


def _compare(path: Path, metadata: dict[str, Any], parts: Parts) -> None:
    if metadata.get("version") != _VERSION:
        raise RecipeError(f"{path} was kept by another version of edgelm, and is left alone: {_REMEDY}")
    kept = metadata["parts"]
    other = [words for name, words in _PARTS.items() if name in parts and kept.get(name) != parts[name]]
    if other:
        raise RecipeError(f"{path} was kept by a run that differs in {', '.join(other)}, and is left alone: {_REMEDY}")


_REMEDY = "run that one again, compress to another place, or remove the file to begin this step from its start"


def _damaged(path: Path, error: Exception) -> RecipeError:
    return RecipeError(f"{path} cannot be read ({error}): remove it, and the step begins again from its start")


def _put(weight: torch.nn.Parameter, kind: str, tensor: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    if kind == "weight":
        weight.copy_(tensor)
    else:
        # AdamW counts its steps on the CPU.
        optimizer.state[weight][kind] = tensor.to(weight.device) if tensor.dim() else tensor
