"""`prune-structured`: remove attention heads, in whole KV groups, and MLP channels.

The remaining matrices are smaller and dense, so every kernel runs them faster. All heads and channels of the model are
ranked together by importance per weight, and the least important are removed until the budget is met. Layers end up
with different sizes; each keeps at least one KV group and 16 channels. The matrix that reads the remaining units is
refitted to its earlier outputs by least squares, without training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import RecipeError
from ..progress import tracked
from ..step import Applied, Outlook, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ...module.units import Block
    from ..importance.curvature import Portion

# The number of channels left is a multiple of this: integer kernels pack columns by 16.
_CHANNELS = 16
# No block of SmolLM2-135M loses more than 3.2 times the ratio of the whole model. Ranking the rest takes time.
_MOST_SHARE = 8
_GRADIENT_TOKENS = 2048
_PORTIONS = 48  # approximate number for a wide MLP
# Attributes in which attention modules may store their sizes.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("split_size", "embed_dim", "hidden_size")


@dataclass(frozen=True)
class PruneStructured:
    """ratio: share of the whole model's parameters to remove; importance: "curvature" or "taylor", both measured on the
    calibration text, or "magnitude" of the weights; refit: whether to refit matrices on that text."""

    ratio: float
    importance: Literal["curvature", "taylor", "magnitude"] = "curvature"
    refit: bool = True

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. Looks for heads and channels in the source, unless this is the first step, where `apply` does
        so at once."""
        from ...module.units import find_blocks

        if outlook.steps:
            find_blocks(outlook.module)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: a forward pass over the text, a forward and backward pass over 2,048 tokens of it, and per
        layer the inverse of a matrix (channels, channels)."""
        from ...module.units import find_blocks
        from ..importance.influence import all_windows

        blocks = find_blocks(module)
        texts = all_windows(bench.token_ids, bench.context_length)
        details = self.cut(module, blocks, *self.measured(module, blocks, texts))
        reads = self.refit or self.importance != "magnitude"
        return Applied(module, {**details, **({"tokens": sum(ids.numel() for ids in texts)} if reads else {})})

    def cut(
        self,
        module: PreTrainedModel,
        blocks: list[Block],
        portions: list[list[Portion]],
        inputs: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Prune in place. portions, inputs: from `measured`. Returns details. Raises: RecipeError."""
        from ...module.linears import matrix_of, own

        costs = [block.parameters(module) for block in blocks]
        before = module.num_parameters()
        kept = choose_units(blocks, portions, costs, self.ratio * before)
        fitted = _fitted(module, blocks, kept, inputs) if self.refit else {}
        _prune(module, blocks, kept)
        for name, matrix in fitted.items():
            matrix_of(own(module, name)).copy_(matrix)
        removed = 100 * (1 - module.num_parameters() / before)
        return {"removed_percent": round(removed, 2), "layers": _sizes(blocks, kept)}

    def measured(
        self, module: PreTrainedModel, blocks: list[Block], texts: list[torch.Tensor]
    ) -> tuple[list[list[Portion]], dict[str, torch.Tensor]]:
        """For each block its portions in order of removal; name of its `outer` -> second moment of what that reads.

        There are no moments if nothing needs them. Cost: see `apply`.
        """
        from ..importance.moments import input_moments
        from ..importance.ranks import magnitudes, taylor

        by_curvature = self.importance == "curvature"
        outers = [block.outer for block in blocks]
        inputs = input_moments(module, outers, texts) if by_curvature or self.refit else {}
        if by_curvature:
            return self._by_curvature(module, blocks, texts, inputs), inputs
        scores = magnitudes(module, blocks) if self.importance == "magnitude" else taylor(module, blocks, texts)
        return [
            portions_by_score(block, score, self.ratio) for block, score in zip(blocks, scores, strict=True)
        ], inputs

    def _by_curvature(
        self, module: PreTrainedModel, blocks: list[Block], texts: list[torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> list[list[Portion]]:
        from ..importance.curvature import portions_by_curvature
        from ..importance.moments import gradient_moments

        every = -(-sum(ids.numel() for ids in texts) // _GRADIENT_TOKENS)
        outputs = gradient_moments(module, [block.outer for block in blocks], texts[::every])
        return [
            portions_by_curvature(
                module, block, inputs[block.outer], outputs[block.outer], _portion_sizes(block, self.ratio)
            )
            for block in tracked(blocks, "blocks ranked")
        ]


def portions_by_score(block: Block, score: torch.Tensor, ratio: float) -> list[Portion]:
    """Portions of a block in ascending order of the units' scores. A portion's harm is the sum of its scores."""
    from ..importance.curvature import Portion

    order, portions, end = score.argsort(), [], 0
    for size in _portion_sizes(block, ratio):
        units = order[end : end + size]
        portions.append(Portion(float(score[units].sum()), units.tolist()))
        end += size
    return portions


def choose_units(
    blocks: list[Block], portions: list[list[Portion]], costs: list[int], budget: float
) -> list[torch.Tensor]:
    """Units of each block to keep, in ascending order.

    portions: of each block, in order of removal; costs: parameters per unit of each block; budget: parameters to
    remove. Raises: RecipeError if that would empty a layer.
    """
    gone: list[list[int]] = [[] for _ in blocks]
    removed = 0.0
    for _, number, units in sorted(_ranked(portions, costs)):
        if removed >= budget:
            break
        gone[number] += units
        removed += costs[number] * len(units)
    if removed < budget:
        most = 100 * removed / budget
        raise RecipeError(
            f"heads and channels have only {most:.0f} % of the parameters that ratio asks for, if each layer keeps one "
            f"KV group and {_CHANNELS} channels: lower the ratio"
        )
    return [_without(block.count, units) for block, units in zip(blocks, gone, strict=True)]


def _ranked(portions: list[list[Portion]], costs: list[int]) -> Iterator[tuple[float, int, list[int]]]:
    """Yield harm per weight, block number and units of each portion. The harm is made non-decreasing within a block, so
    that sorting keeps the block's order."""
    for number, (cost, found) in enumerate(zip(costs, portions, strict=True)):
        most = 0.0
        for portion in found:
            most = max(most, portion.harm / (cost * len(portion.units)))
            yield most, number, portion.units


def _portion_sizes(block: Block, ratio: float) -> list[int]:
    """Units per portion. After each portion a multiple of 16 channels remains; of an attention, one KV group goes at a
    time. Nothing is listed beyond `_MOST_SHARE` times the ratio, but for the first portion."""
    if block.kind == "attention":
        sizes = [1] * (block.count - 1)
    else:
        size = max(1, block.count // (_CHANNELS * _PORTIONS)) * _CHANNELS
        first = block.count % _CHANNELS
        rest = max(0, (block.count - first - _CHANNELS) // size)
        sizes = ([first] if first and rest else []) + [size] * rest
    most = _MOST_SHARE * ratio * block.count
    return [size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True) if end <= max(most, sizes[0])]


def _without(count: int, gone: list[int]) -> torch.Tensor:
    import torch

    left = torch.ones(count, dtype=torch.bool)
    left[gone] = False
    return left.nonzero().flatten()


def _fitted(
    module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Name of each matrix that reads a pruned block -> the matrix refitted to the remaining units."""
    from ...module.linears import matrix_of, own
    from ..importance.curvature import refitted

    return {
        block.outer: refitted(matrix_of(own(module, block.outer)), inputs[block.outer], block.columns(units))
        for block, units in zip(blocks, kept, strict=True)
        if len(units) < block.count
    }


def _prune(module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor]) -> None:
    """Cut the matrices, and check that the logits equal those of the whole model with the removed units set to 0.

    Raises: RecipeError if they do not; the module is then unchanged.
    """
    from ...module.edits import KEY, edit, edits_of
    from ...module.units import keep_units, outer_inputs, probe_logits, same_logits

    def silence(number: int, values: torch.Tensor) -> torch.Tensor:
        columns = blocks[number].columns(kept[number])
        return values.new_zeros(values.shape[-1]).index_fill(0, columns, 1) * values

    with outer_inputs(module, blocks, silence):
        expected = probe_logits(module)
    saved = [(part, {**vars(part), "_parameters": dict(part._parameters)}) for part in module.modules()]
    log = edits_of(module)
    try:
        for block, units in zip(blocks, kept, strict=True):
            keep_units(module, block, units)
        edit(module, "resize", linears=_shapes(module, blocks), attributes=_attributes(module, blocks, kept))
        same = same_logits(expected, probe_logits(module))
    except Exception as error:  # noqa: BLE001, modeling code that relies on the old sizes may raise anything
        same, reason = False, f" ({error})"
    else:
        reason = ""
    if not same:
        for part, state in saved:
            vars(part).update(state)
        setattr(module.config, KEY, log)
        raise RecipeError(f"{type(module).__name__} does not work with fewer heads or channels{reason}")


def _shapes(module: PreTrainedModel, blocks: list[Block]) -> dict[str, list[int]]:
    from ...module.linears import own, shape_of

    return {name: list(shape_of(own(module, name))) for block in blocks for name in (*block.inner, block.outer)}


def _attributes(module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor]) -> dict[str, dict[str, int]]:
    """Name of each pruned attention module -> new values of its size attributes, see `edits`."""
    found = {}
    for block, units in zip(blocks, kept, strict=True):
        if block.call is None or len(units) == block.count:
            continue
        call, left = block.call, len(units)
        heads = call.heads // call.kv_heads * left
        changes = {
            **dict.fromkeys(_HEADS, (call.heads, heads)),
            **dict.fromkeys(_KV_HEADS, (call.kv_heads, left)),
            **dict.fromkeys(_WIDTHS, (call.heads * call.key_size, heads * call.key_size)),
        }
        part: Any = module.get_submodule(call.name)
        values = {name: new for name, (old, new) in changes.items() if vars(part).get(name) == old}
        if hasattr(part, "config"):
            values |= {"config.num_attention_heads": heads, "config.num_key_value_heads": left}
        found[call.name] = values
    return found


def _sizes(blocks: list[Block], kept: list[torch.Tensor]) -> dict[str, dict[str, list[int]]]:
    """Layer index -> KV groups and channels, each as [before, after]."""
    sizes: dict[str, dict[str, list[int]]] = {}
    for block, units in zip(blocks, kept, strict=True):
        what = "kv_groups" if block.kind == "attention" else "channels"
        sizes.setdefault(str(block.layer), {})[what] = [block.count, len(units)]
    return sizes
