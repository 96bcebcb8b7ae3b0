"""Checkpoint of a training step: one safetensors file, replaced atomically.

    weight/NAME          a trained parameter
    best/NAME            the parameter at the best held-out evaluation, if that was an earlier step
    exp_avg/NAME, ...    AdamW's moments and step count; left out when the training is done
    metadata             JSON under `edgelm`: version, state, and digests of everything that determines the result

Tensors and state are one file, so they never disagree. accelerate's `save_state` is not used: it writes pickles.
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
from ...module.edits import edits_of
from ..recipe import step_settings
from ..step import Step, Workbench
from .precision import Precision
from .texts import TrainingTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "training.safetensors"
_KEY, _VERSION = "edgelm", 3
# Key of a digest -> its subject, for messages.
_PARTS = {
    "step": "the step's settings",
    "before": "the steps before it",
    "edits": "the choices of the steps before it",
    "text": "the training text",
    "held_out": "the held-out text",
    "choosing": "the calibration text",
    "weights": "the model",
}

Parts = dict[str, str]


@dataclass
class State:
    """State of a training. losses: one per step; curve: results of `HeldOut.read`, each with its step; best: step of
    the best evaluation so far, -1 for none; done: the training has ended; samples: `HeldOut.samples` of the kept
    weights, set at the end; precision: of the matrix products, decided when the training starts."""

    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: int = -1
    done: bool = False
    samples: list[dict[str, list[int]]] = field(default_factory=list)
    precision: Precision | None = None


class Checkpoint:
    """The checkpoint file of one step. Nothing is written before the first `save`."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        """parts: from `identify`; an existing file is loaded only if its parts are equal."""
        self.path = folder / _NAME
        self._parts = parts

    def load(
        self, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[State, dict[str, torch.Tensor]]:
        """Load the checkpoint into the parameters and the optimizer.

        Returns the state, a new one if there is no checkpoint, and the best weights by name, empty if those are the
        last ones. Raises: RecipeError if the file is damaged or belongs to another step, recipe, text or model. The
        file is not changed.
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
        """Replace the file. optimizer: None if no step is left. Raises: OutputError; the earlier file stays."""
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
        except (OSError, SafetensorError) as error:  # SafetensorError: a full disk
            raise OutputError(self._not_written(len(state.losses), error)) from error
        finally:
            partial.unlink(missing_ok=True)

    def _not_written(self, step: int, error: Exception) -> str:
        kept = f"the earlier one stays in {self.path}" if self.path.is_file() else "there is no earlier one"
        return (
            f"the checkpoint after step {step} cannot be written to {self.path.parent} ({error}), and {kept}: free "
            "some space and run the same command again to continue"
        )


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def identify(step: Step, module: PreTrainedModel, texts: TrainingTexts, bench: Workbench, *others: Path) -> Parts:
    """Digests of everything that determines a training's result: settings, steps before it, texts and weights.

    module: the model before the training; others: folders of further models, such as a teacher. Cost: the weights are
    read once.
    """
    files = [path for folder in (bench.source, *others) for path in weight_files(folder)]
    return {
        **_known_ahead(step, texts, bench),
        "edits": _digest(edits_of(module)),
        "weights": _digest([file_digest(path) for path in files]),
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def check_ahead(step: Step, texts: TrainingTexts, bench: Workbench) -> None:
    """Check before any step runs that an existing checkpoint belongs to this step, as far as is known. Raises:
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
        raise RecipeError(f"{path} is left unchanged, because another version of edgelm wrote it: {_REMEDY}")
    kept = metadata["parts"]
    other = [words for name, words in _PARTS.items() if name in parts and kept.get(name) != parts[name]]
    if other:
        raise RecipeError(
            f"{path} is left unchanged, because it was written by a run that differs in {', '.join(other)}: {_REMEDY}"
        )


_REMEDY = "repeat that run, choose another --out, or remove the file to start this step over"


def _damaged(path: Path, error: Exception) -> RecipeError:
    return RecipeError(f"{path} cannot be read ({error}): remove it to start this step over")


def _put(weight: torch.nn.Parameter, kind: str, tensor: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    if kind == "weight":
        weight.copy_(tensor)
    elif tensor.shape == weight.shape:
        # The fused AdamW pairs elements by their place in memory, so a moment needs the weight's strides.
        optimizer.state[weight][kind] = torch.empty_like(weight).copy_(tensor)
    else:
        optimizer.state[weight][kind] = tensor.to(weight.device)  # the step count
