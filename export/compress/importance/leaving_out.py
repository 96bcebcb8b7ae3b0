"""Find the layers, or attention sublayers, whose removal changes the predictions least, one after another.

The measure is the KL divergence of the model without the part from the whole model, on a text. After each removal, the
remaining parts are measured again, because two parts that seem unimportant alone may do the same work. Block influence
(`influence.py`) only selects the candidates: it takes one pass for all parts, but does not tell which changes of the
hidden state affect the predictions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...module.edits import AbsentAttention, AbsentLayer, present_layers
from ...module.structure import attention_sublayers
from ...module.units import same_logits
from .influence import windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Spread over the text. Twice as many rank the layers of a model of 135M parameters the same.
MEASURED_TOKENS = 1024
# Candidates beyond twice the number of parts to remove.
_TRIED_MORE = 6
# Log-probabilities held in memory. With a large vocabulary, fewer positions are measured.
_MOST_NUMBERS = 1 << 27


def least_missed_layers(
    module: PreTrainedModel, count: int, token_ids: Sequence[int], context_length: int, influence: Mapping[int, float]
) -> dict[int, float]:
    """Index of each layer to remove, in order of removal -> KL in nats a token without it and those before it.

    influence: layer index -> block influence, which selects the candidates. Cost: a third of a pass over 1,024 tokens
    per candidate, and again for the first few candidates after each removal.
    """
    return _LeavingOut(module, present_layers(module), AbsentLayer, token_ids, context_length).least(count, influence)


def least_missed_attention(
    module: PreTrainedModel, count: int, token_ids: Sequence[int], context_length: int, influence: Mapping[int, float]
) -> dict[int, float]:
    """Layer indexes of the attention sublayers to remove. See `least_missed_layers`."""
    names = attention_sublayers(module)
    return _LeavingOut(module, names, AbsentAttention, token_ids, context_length).least(count, influence)


class _LeavingOut:
    """Measures a module without some of its parts. The module is restored after each call."""

    def __init__(
        self,
        module: PreTrainedModel,
        names: dict[int, str],
        stand_in: Callable[[torch.nn.Module, int | None], torch.nn.Module],
        token_ids: Sequence[int],
        context_length: int,
    ) -> None:
        self._module, self._names, self._stand_in = module, names, stand_in
        self._layers = present_layers(module)
        vocabulary = int(module.config.get_text_config().vocab_size)
        found = windows(token_ids, context_length)
        most = max(1, min(MEASURED_TOKENS, _MOST_NUMBERS // vocabulary) // found[0].shape[1])
        self._ids = torch.cat(found[:: -(-len(found) // most)])
        self._gone: dict[str, torch.nn.Module] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._forms: dict[str, int | None] = {}
        logits = self._read()
        self._whole = torch.log_softmax(logits.float(), -1)
        middle = sorted(self._layers)[len(self._layers) // 2]
        # Runs can start at a middle layer only if a layer passes a single tensor to the next one.
        self._short = same_logits(logits, self._run(middle, {}))

    def least(self, count: int, influence: Mapping[int, float]) -> dict[int, float]:
        """Index of each removed part -> KL, in order of removal."""
        tried = sorted(self._names, key=lambda index: influence[index])[: 2 * count + _TRIED_MORE]
        known = dict.fromkeys(tried, 0.0)
        chosen: dict[int, float] = {}
        while len(chosen) < count:
            found: dict[int, float] = {}
            # Further removals are assumed not to make a part less missed. So a part whose earlier KL is above the
            # lowest new KL need not be measured again.
            for index in sorted(known, key=lambda index: known[index]):
                if found and min(found.values()) <= known[index]:
                    break
                found[index] = self._without(index)
            known |= found
            least = min(found, key=lambda index: found[index])
            chosen[least] = known.pop(least)
            self._gone |= self._absent(least)
            if len(chosen) < count:
                self._read()
        return chosen

    def _absent(self, index: int) -> dict[str, torch.nn.Module]:
        name = self._names[index]
        return {name: self._stand_in(self._module.get_submodule(name), self._forms[name])}

    def _without(self, index: int) -> float:
        logits = self._run(index if self._short else None, self._absent(index))
        mean = torch.nn.functional.kl_div(
            torch.log_softmax(logits.float(), -1).flatten(0, 1),
            self._whole.flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        return float(mean)

    def _read(self) -> torch.Tensor:
        """Run the module without the removed parts and record each layer's input. Returns the logits."""
        names = {**{-1 - index: name for index, name in self._names.items()}, **self._layers}

        def note(index: int, args: tuple[Any, ...], known: dict[str, Any], output: Any) -> None:
            if index >= 0:
                self._inputs[index] = args[0] if args else known["hidden_states"]
            self._forms[names[index]] = len(output) if isinstance(output, tuple) else None

        def hook(index: int) -> Any:
            return lambda _, args, known, output: note(index, args, known, output)

        with _replaced(self._module, self._gone), contextlib.ExitStack() as stack:
            for index, name in names.items():
                part = self._module.get_submodule(name)
                stack.callback(part.register_forward_hook(hook(index), with_kwargs=True).remove)
            with torch.no_grad():
                logits: torch.Tensor = self._module(input_ids=self._ids, use_cache=False).logits
        return logits

    def _run(self, first: int | None, absent: dict[str, torch.nn.Module]) -> torch.Tensor:
        """Logits without the removed parts and those in `absent`. first: index of the layer to start at, with its
        recorded input (None: run all layers)."""
        before = [] if first is None else [(i, name) for i, name in self._layers.items() if i < first]
        passed = {name: AbsentLayer(self._module.get_submodule(name), self._forms[name]) for _, name in before}
        parts = {name: part for name, part in {**self._gone, **absent}.items() if not _inside(name, passed)}
        with _replaced(self._module, {**passed, **parts}), contextlib.ExitStack() as stack:
            if first is not None:
                start, inputs = self._module.get_submodule(self._layers[first]), self._inputs[first]

                def begin(_: Any, args: tuple[Any, ...], known: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                    return ((inputs, *args[1:]), known) if args else (args, {**known, "hidden_states": inputs})

                stack.callback(start.register_forward_pre_hook(begin, with_kwargs=True).remove)
            with torch.no_grad():
                logits: torch.Tensor = self._module(input_ids=self._ids, use_cache=False).logits
        return logits


def _inside(name: str, layers: Mapping[str, object]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


@contextlib.contextmanager
def _replaced(module: PreTrainedModel, parts: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Replace submodules while the block runs. parts: submodule name -> replacement."""
    originals = {name: module.get_submodule(name) for name in parts}
    try:
        for name, part in parts.items():
            module.set_submodule(name, part)
        yield
    finally:
        for name, part in originals.items():
            module.set_submodule(name, part)
