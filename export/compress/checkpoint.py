"""What a training step keeps to go on from: one safetensors file, replaced as a whole.

    weight/NAME          a parameter that is trained
    exp_avg/NAME, ...    AdamW's moments and count of it; left out when the training is done
    metadata             JSON under `edgelm`: version, digest of what is trained and how, loss of every step so far

Tensors and count of steps are one file, so they never disagree. accelerate's own `save_state` is not used: it writes
pickles.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...runtime.bundle.folder import file_digest
from ..errors import RecipeError
from .edits import edits_of
from .recipe import step_settings
from .schedule import Schedule
from .steps import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "training.safetensors"
_KEY, _VERSION = "edgelm", 1


class Checkpoint:
    """One step's place. Nothing is written before the first `save`."""

    def __init__(self, folder: Path, digest: str) -> None:
        """digest: `identify`'s, without which a file that is there is not read."""
        self.path = folder / _NAME
        self._digest = digest

    def load(self, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Put what was kept into the parameters and the optimizer. Returns the losses so far, none where nothing was
        kept.

        Raises: RecipeError for a file of another step, recipe or model, or one that is damaged; it stays as it is.
        """
        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                state = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                self._check(state)
                with torch.no_grad():
                    for key in file.keys():  # noqa: SIM118, not a dict
                        kind, _, name = key.partition("/")
                        _put(weights[name], kind, file.get_tensor(key), optimizer)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise RecipeError(
                f"{self.path} cannot be read ({error}): remove it, and the step begins again from its start"
            ) from error
        losses: list[float] = state["losses"]
        return losses

    def save(
        self, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None, losses: list[float]
    ) -> None:
        """Replace the file. optimizer: None where no step is left. Raises: OSError."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in weights.items()}
        if optimizer is not None:
            for name, weight in weights.items():
                tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(weight, {}).items()}
        state = {"version": _VERSION, "digest": self._digest, "losses": losses}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{_NAME}.partial-{secrets.token_hex(8)}")
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(plain, partial, metadata={_KEY: json.dumps(state)})
        partial.replace(self.path)

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION or state.get("digest") != self._digest:
            raise RecipeError(
                f"{self.path} was kept by another step, recipe, text or model, and is left alone: run that one again, "
                "compress to another place, or remove the file to begin this step from its start"
            )


def _put(weight: torch.nn.Parameter, kind: str, tensor: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    if kind == "weight":
        weight.copy_(tensor)
    else:
        # AdamW counts its steps on the CPU.
        optimizer.state[weight][kind] = tensor.to(weight.device) if tensor.dim() else tensor


def identify(step: Schedule, module: PreTrainedModel, token_ids: list[int], bench: Workbench, *others: Path) -> str:
    """A digest of all that decides what a training gives: settings, the steps before it, texts, and weights.

    module: that is trained, before; others: folders of further models that take part. Cost: reading the weights once.
    """
    settings = {key: value for key, value in step_settings(step).items() if key != "checkpoint_every"}
    files = [path for folder in (bench.source, *others) for path in sorted(folder.glob("*.safetensors"))]
    parts = {
        "step": settings,
        "before": bench.before,
        "edits": edits_of(module),
        "text": token_ids,
        "choosing": list(bench.token_ids),
        "weights": [file_digest(path) for path in files],
    }
    return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"
