"""Find a module's layers and attention sublayers by running it, not by the name of its architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIED = 2  # tokens


def decoder_layers(module: PreTrainedModel) -> dict[int, str]:
    """Index of each layer -> name of its module. Raises: RecipeError if the model has no list of layers."""
    count = int(getattr(module.config.get_text_config(), "num_hidden_layers", 0))
    lists = [
        name for name, item in module.named_modules() if isinstance(item, torch.nn.ModuleList) and len(item) == count
    ]
    if not lists:
        raise RecipeError(f"{type(module).__name__} has no list of {count} layers: this step cannot be used with it")
    outer = min(lists, key=len)
    return {index: f"{outer}.{index}" for index in range(count)}


@dataclass(frozen=True)
class AttentionCall:
    """Name of an attention module, and the sizes that it passes to transformers' attention registry."""

    name: str
    heads: int
    kv_heads: int
    key_size: int
    value_size: int


def attention_sublayers(module: PreTrainedModel) -> dict[int, str]:
    """Index of each layer that has attention -> name of the attention module, in order. Raises: RecipeError."""
    return {index: call.name for index, call in attention_calls(module).items()}


def attention_calls(module: PreTrainedModel) -> dict[int, AttentionCall]:
    """Index of each layer that has attention -> its attention module, in order.

    An attention module is one that calls transformers' attention registry. Raises: RecipeError if none does.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {id(item): name for name, item in module.named_modules()}
    found: dict[int, AttentionCall] = {}

    def note(caller: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        if hasattr(caller, "layer_idx"):
            sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
            found[int(caller.layer_idx)] = AttentionCall(names[id(caller)], *sizes)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    name, before = "edgelm_note_callers", module.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, note)
    module.config._attn_implementation = name
    reason = ""
    try:
        run_briefly(module)
    except Exception as error:  # noqa: BLE001, modeling code that looks the name up elsewhere may raise anything
        reason = f" ({error})"
    finally:
        module.config._attn_implementation = before
    if not found or reason:
        raise RecipeError(
            f"{type(module).__name__} does not call transformers' attention registry{reason}, so its attention "
            "sublayers cannot be found: this step cannot be used with it"
        )
    return dict(sorted(found.items()))


@contextlib.contextmanager
def observed(module: PreTrainedModel, names: dict[int, str]) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """Record inputs and outputs of submodules while the block runs: index -> (first input, output) of each call.

    names: index -> name of the submodule.
    """
    seen: dict[int, list[tuple[Any, Any]]] = {index: [] for index in names}

    def hook(index: int) -> Any:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[index].append((args[0] if args else kwargs["hidden_states"], output))

        return note

    handles = [
        module.get_submodule(name).register_forward_hook(hook(index), with_kwargs=True) for index, name in names.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_briefly(module: PreTrainedModel) -> None:
    """Run a forward pass over a few tokens, to trigger hooks."""
    with torch.no_grad():
        module(input_ids=torch.zeros(1, _TRIED, dtype=torch.int64), use_cache=False)
