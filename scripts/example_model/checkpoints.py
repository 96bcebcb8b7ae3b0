"""Files of a training run of the example model, which appear complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from .model import Optimizers


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def weights_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return the parameters by name; tied ones appear once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Checkpoints:
    """The folder of a run: the state to go on from, and the weights that were best on the development stories.

    A stop at any moment leaves the last complete state. Tensors and step are one file, so they never disagree.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "state.safetensors"
        self._best = folder / "best.safetensors"

    def save_state(self, step: int, best_loss: float, model: LlamaForCausalLM, optimizers: Optimizers) -> None:
        """Write all that a run needs to go on after a step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight/{name}": tensor for name, tensor in weights_of(model).items()}
        for which, optimizer in enumerate(optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"moment/{which}/{index}/{name}": tensor for name, tensor in moments.items()}
        write_tensors(self._state, tensors, {"step": str(step), "best_loss": repr(best_loss)})

    def has_state(self) -> bool:
        """Tell whether there is a state to go on from."""
        return self._state.is_file()

    def load_state(self, model: LlamaForCausalLM, optimizers: Optimizers) -> tuple[int, float]:
        """Restore the state; returns the step it was saved after and the best loss so far."""
        with safe_open(self._state, framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
        states = [optimizer.state_dict() | {"state": {}} for optimizer in optimizers]
        for key, tensor in load_file(self._state).items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                model.get_parameter(name).data.copy_(tensor)
            else:
                which, index, moment = name.split("/")
                states[int(which)]["state"].setdefault(int(index), {})[moment] = tensor
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        return int(metadata["step"]), float(metadata["best_loss"])

    def save_best(self, model: LlamaForCausalLM) -> None:
        """Keep these weights as the best so far."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._best, weights_of(model))

    def load_best(self, model: LlamaForCausalLM) -> None:
        """Put the best weights into the model."""
        for name, tensor in load_file(self._best).items():
            model.get_parameter(name).data.copy_(tensor)
