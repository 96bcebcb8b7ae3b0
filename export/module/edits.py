"""Structural edits of a module, logged in its configuration so that a saved model can be rebuilt.

A Hugging Face configuration describes layers that are alike. Their differences are a list of edits under the
configuration's key `edgelm_edits`: names of functions in this file with their arguments, in order. Building the model
from the configuration and replaying the edits gives modules of the right shapes to load the weights into.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SourceError
from .linears import FactoredLinear, own, put_matrix, shape_of, shared_matrices
from .structure import attention_sublayers, decoder_layers, observed, run_briefly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "edgelm_edits"


class _Absent(torch.nn.Module):
    """Placeholder of a removed layer or attention sublayer.

    transformers takes the number of cached tokens from the first layer, so a placeholder there updates the KV cache.
    """

    def __init__(self, original: torch.nn.Module, form: int | None) -> None:
        super().__init__()
        # Modeling code reads plain attributes of a layer from outside, such as its attention type.
        for name, value in vars(original).items():
            if not name.startswith("_") and isinstance(value, (int, float, str, bool, type(None))):
                setattr(self, name, value)
        self.index = getattr(original, "layer_idx", None)
        self._form = form

    def _formed(self, hidden: torch.Tensor) -> Any:
        return hidden if self._form is None else (hidden, *[None] * (self._form - 1))

    def _count(self, hidden: torch.Tensor, known: dict[str, Any]) -> None:
        cache = known.get("past_key_values")
        if cache is not None and self.index == 0:
            keys = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(keys, keys, 0)


class AbsentLayer(_Absent):
    """Returns its input."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **known: Any) -> Any:
        """hidden_states: (batch, tokens, hidden), returned unchanged in the form of the original layer's output."""
        self._count(hidden_states, known)
        return self._formed(hidden_states)


class AbsentAttention(_Absent):
    """Returns zeros. The exporter's passes remove their addition to the residual."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **known: Any) -> Any:
        """hidden_states: (batch, tokens, hidden). Returns zeros (1, 1, hidden) in the form of the original attention's
        output."""
        self._count(hidden_states, known)
        return self._formed(hidden_states.new_zeros(1, 1, hidden_states.shape[-1]))


def edit(module: PreTrainedModel, name: str, **arguments: Any) -> None:
    """Apply an edit in place and log it. name: key of `_EDITS`; arguments: plain data."""
    _EDITS[name](module, **arguments)
    done = [*edits_of(module), {"edit": name, **arguments}]
    setattr(module.config, KEY, done)


def edits_of(module: PreTrainedModel) -> list[dict[str, Any]]:
    """The edits logged in a module's configuration, oldest first."""
    return list(getattr(module.config, KEY, None) or [])


def replay(module: PreTrainedModel, edits: list[dict[str, Any]]) -> None:
    """Apply logged edits to a module. Raises: SourceError for an edit that this version does not know."""
    setattr(module.config, KEY, [])
    for item in edits:
        arguments = {key: value for key, value in item.items() if key != "edit"}
        function = _EDITS.get(str(item.get("edit")))
        if function is None or set(arguments) != set(list(inspect.signature(function).parameters)[1:]):
            raise SourceError(f"the model's config.json has an edit that this edgelm does not know: {item!r:.100}")
        edit(module, item["edit"], **arguments)


class LayerConfig:
    """The configuration of one layer: its own values, and the model's for all else. Assignments go to the model's."""

    def __init__(self, original: Any, values: dict[str, int]) -> None:
        vars(self).update(_original=original, _values=values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy looks these up before `_original` is set
            raise AttributeError(name)
        values = vars(self)
        return values["_values"][name] if name in values["_values"] else getattr(values["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_original"], name, value)


def present_layers(module: PreTrainedModel) -> dict[int, str]:
    """Index of each remaining layer -> name of its module. Raises: RecipeError."""
    names = decoder_layers(module)
    return {index: name for index, name in names.items() if not isinstance(module.get_submodule(name), AbsentLayer)}


def _drop_layers(module: PreTrainedModel, layers: list[int]) -> None:
    names = decoder_layers(module)
    _replace(module, {index: names[index] for index in layers}, AbsentLayer)


def _skip_attention(module: PreTrainedModel, layers: list[int]) -> None:
    names = attention_sublayers(module)
    _replace(module, {index: names[index] for index in layers}, AbsentAttention)


def _replace(module: PreTrainedModel, names: dict[int, str], stand_in: type[_Absent]) -> None:
    with observed(module, names) as seen:
        run_briefly(module)
    for index, name in names.items():
        output = seen[index][0][1]
        absent = stand_in(module.get_submodule(name), len(output) if isinstance(output, tuple) else None)
        absent.index = index
        module.set_submodule(name, absent)


def _resize(module: PreTrainedModel, linears: dict[str, list[int]], attributes: dict[str, dict[str, int]]) -> None:
    """Resize linear layers. linears: name -> [outputs, inputs]; weights of that shape stay; attributes: module name ->
    values of its size attributes, or of its configuration's as `config.NAME`."""
    for name, (outputs, inputs) in linears.items():
        linear = module.get_submodule(name)
        if shape_of(linear) != (outputs, inputs):
            bias = linear.bias is not None
            put_matrix(linear, torch.empty(outputs, inputs), torch.empty(outputs) if bias else None)
    for name, values in attributes.items():
        part: Any = module.get_submodule(name)
        for key, value in values.items():
            if not key.startswith("config."):
                setattr(part, key, value)
        settings = {key.removeprefix("config."): value for key, value in values.items() if key.startswith("config.")}
        if settings:
            earlier = vars(part.config)["_values"] if isinstance(part.config, LayerConfig) else {}
            original = vars(part.config)["_original"] if isinstance(part.config, LayerConfig) else part.config
            part.config = LayerConfig(original, {**earlier, **settings})


def _factor(module: PreTrainedModel, ranks: dict[str, int]) -> None:
    """Replace linear layers by two factors. ranks: name -> rank."""
    for name, rank in ranks.items():
        linear = module.get_submodule(name)
        module.set_submodule(name, FactoredLinear.like(linear, rank))


def _share(module: PreTrainedModel, groups: list[list[int]], embedding: bool) -> None:
    """Make the layers of each group use the first one's matrices. embedding: make the head use the embedding's."""
    for group in groups:
        for first, *others in shared_matrices(module, group):
            for name in others:
                own(module, name).weight = own(module, first).weight
    if embedding:
        whole: Any = module
        head = whole.get_output_embeddings()
        head.weight = module.get_input_embeddings().weight
        module.config.tie_word_embeddings = True


_EDITS: dict[str, Callable[..., None]] = {
    "drop_layers": _drop_layers,
    "skip_attention": _skip_attention,
    "resize": _resize,
    "factor": _factor,
    "share": _share,
}
