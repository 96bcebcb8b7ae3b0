"""Find the units of structured pruning: KV groups of attention and channels of MLPs.

A KV group is a key head and a value head with all query heads that read them. A channel is one input of the MLP's last
matrix with all weights that compute it. The rows of each unit are guessed from shapes. The guess is tested by reversing
the order of all units, which must not change the logits. No architecture is named here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import RecipeError
from .linears import is_linear, matrix_of, own, put_matrix, require_unshared, shape_of
from .structure import AttentionCall, attention_calls, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Another order of sums changes logits by about 1e-6 of the largest; a wrong guess changes them by far more.
_TOLERANCE = 1e-3
_PROBE_TOKENS = 16
# Rows per unit in each of the consecutive blocks of a matrix's outputs: (1, 1) is gate and up in one matrix, (2,) is
# gate and up interleaved.
_Layout = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The units of one attention sublayer or MLP.

    layer: index; count: of units; inner: name of each linear layer that computes the units -> layout of its outputs;
    outer: name of the linear layer that reads them; width: inputs of `outer` per unit; call: None for an MLP.
    """

    kind: Literal["attention", "MLP"]
    layer: int
    count: int
    inner: dict[str, _Layout]
    outer: str
    width: int
    call: AttentionCall | None = None

    def rows(self, layout: _Layout, units: torch.Tensor) -> torch.Tensor:
        """Indexes of these units' outputs in a matrix of this layout, block by block."""
        starts = itertools.accumulate((width * self.count for width in layout), initial=0)
        parts = [
            start + (units[:, None] * width + torch.arange(width)).flatten()
            for start, width in zip(starts, layout, strict=False)
        ]
        return torch.cat(parts)

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """Indexes of the inputs of `outer` that these units compute."""
        return self.rows((self.width,), units)

    def parameters(self, module: PreTrainedModel) -> int:
        """Number of parameters of one unit."""
        inner = sum(
            sum(layout) * (shape_of(own(module, name))[1] + (own(module, name).bias is not None))
            for name, layout in self.inner.items()
        )
        return inner + self.width * shape_of(own(module, self.outer))[0]


def find_blocks(module: PreTrainedModel) -> list[Block]:
    """All attention sublayers and MLPs of a module. The module is unchanged afterwards.

    Raises: RecipeError if a layer's matrices do not form an attention sublayer or MLP of a known layout.
    """
    calls, layers = attention_calls(module), decoder_layers(module)
    order = _called_linears(module, list(layers.values()))
    choices: list[list[Block]] = []
    for index, layer in layers.items():
        names = [name for name in order if name.startswith(f"{layer}.")]
        if index in calls:
            inside = [name for name in names if name.startswith(f"{calls[index].name}.")]
            choices.append(_attention_blocks(module, index, calls[index], inside))
            names = [name for name in names if name not in inside]
        if names:
            choices.append(_mlp_blocks(module, index, names))
    require_unshared(module, order, "prune-structured")
    for turn in range(2):
        blocks = [found[min(turn, len(found) - 1)] for found in choices]
        if _can_change_places(module, blocks):
            return blocks
    raise RecipeError(
        f"{type(module).__name__}: prune-structured cannot find the matrix rows of each head and channel "
        "(reordering heads and channels changes the logits), so it cannot be used with this model"
    )


def keep_units(module: PreTrainedModel, block: Block, kept: torch.Tensor) -> None:
    """Keep only the weights of these units. kept: indexes in any order."""
    for name, layout in block.inner.items():
        linear, rows = own(module, name), block.rows(layout, kept)
        put_matrix(linear, matrix_of(linear)[rows], None if linear.bias is None else linear.bias.detach()[rows])
    outer = own(module, block.outer)
    put_matrix(outer, matrix_of(outer)[:, block.columns(kept)], None if outer.bias is None else outer.bias.detach())


def probe_logits(module: PreTrainedModel) -> torch.Tensor:
    """Logits of 16 tokens spread over the vocabulary."""
    vocabulary = int(module.config.get_text_config().vocab_size)
    ids = (torch.arange(1, _PROBE_TOKENS + 1) * 7919 % vocabulary)[None]
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits
    return logits


def same_logits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    return float((first - second).abs().max()) <= _TOLERANCE * float(first.abs().max())


@contextlib.contextmanager
def outer_inputs(module: PreTrainedModel, blocks: list[Block], hook: Any) -> Iterator[None]:
    """While the block runs, call hook(number, input of `outer`) for each block. A tensor that it returns replaces the
    input. number: position in `blocks`."""

    def handle(number: int) -> Any:
        def read(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
            found = hook(number, args[0])
            return None if found is None else (found,)

        return own(module, blocks[number].outer).register_forward_pre_hook(read)

    handles = [handle(number) for number in range(len(blocks))]
    try:
        yield
    finally:
        for item in handles:
            item.remove()


def _called_linears(module: PreTrainedModel, layers: list[str]) -> list[str]:
    """Names of the linear layers inside the decoder layers, in the order of their calls."""
    order: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    prefixes = tuple(f"{layer}." for layer in layers)
    handles = [
        part.register_forward_hook(note(name))
        for name, part in module.named_modules()
        if name.startswith(prefixes) and is_linear(part)
    ]
    try:
        probe_logits(module)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _attention_blocks(module: PreTrainedModel, index: int, call: AttentionCall, names: list[str]) -> list[Block]:
    """Guesses of an attention sublayer's layout, likeliest first. Raises: RecipeError."""
    groups = call.heads // call.kv_heads
    query, key, value = groups * call.key_size, call.key_size, call.value_size
    layouts = [(query,), (key,), (value,), (query, key, value), (key, value)]
    return _blocks(module, names, layouts, ("attention", index, call.kv_heads, groups * value, call))


def _mlp_blocks(module: PreTrainedModel, index: int, names: list[str]) -> list[Block]:
    count = shape_of(own(module, names[-1]))[1]
    return _blocks(module, names, [(1,), (1, 1)], ("MLP", index, count, 1, None))


def _blocks(
    module: PreTrainedModel,
    names: list[str],
    layouts: list[_Layout],
    rest: tuple[Literal["attention", "MLP"], int, int, int, AttentionCall | None],
) -> list[Block]:
    """Two guesses: blocks in one matrix follow each other, or are interleaved unit by unit. Raises: RecipeError."""
    kind, index, count, width, call = rest
    *inner, outer = names or [""]
    known = {sum(layout) * count: layout for layout in reversed(layouts)}
    sizes = {name: shape_of(own(module, name))[0] for name in inner}
    if not inner or shape_of(own(module, outer))[1] != width * count or not set(sizes.values()) <= set(known):
        raise RecipeError(
            f"layer {index} of {type(module).__name__} has an {kind} of unknown structure: "
            f"{', '.join(names) or 'no linear layers'}. prune-structured cannot be used with it, nor after low-rank"
        )
    behind: dict[str, _Layout] = {name: known[size] for name, size in sizes.items()}
    mixed: dict[str, _Layout] = {name: (sum(layout),) for name, layout in behind.items()}
    return [Block(kind, index, count, found, outer, width, call) for found in (behind, mixed)]


def _can_change_places(module: PreTrainedModel, blocks: list[Block]) -> bool:
    """Whether the logits stay the same when the units of each block are reversed. Restores their order."""
    before = probe_logits(module)
    _reverse(module, blocks)
    try:
        after = probe_logits(module)
    finally:
        _reverse(module, blocks)
    return same_logits(before, after)


def _reverse(module: PreTrainedModel, blocks: list[Block]) -> None:
    for block in blocks:
        turned = torch.arange(block.count - 1, -1, -1)
        for name, layout in block.inner.items():
            linear, rows = own(module, name), block.rows(layout, turned)
            for values in (matrix_of(linear), linear.bias):
                if values is not None:
                    values.data.copy_(values.data[rows])
        outer = matrix_of(own(module, block.outer))
        outer.copy_(outer[:, block.columns(turned)])
