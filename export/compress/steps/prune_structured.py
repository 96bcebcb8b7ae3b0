"""`prune-structured`: leave out attention heads, whole KV groups of them, and channels of MLPs: smaller matrices, which
every kernel runs faster.

All heads and channels of the model are ranked together, by importance for each weight that they cost, and the least
important go until the budget is met. So layers end up unlike each other; in each, one KV group and some channels stay.
The matrix that reads those that stay is fitted to what it computed before, by least squares: no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import RecipeError
from ..step import Applied, Outlook, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..importance.curvature import Portion
    from ..module.units import Block
    from ..step import Outlook

# Multiples of so many channels stay: integer kernels pack columns by 16.
_CHANNELS = 16
_PORTIONS = 48  # of the channels of a wide MLP
# Attributes in which attention modules keep their sizes, where they do.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("split_size", "embed_dim", "hidden_size")


@dataclass(frozen=True)
class PruneStructured:
    """ratio: share of the whole model's parameters that goes; importance: "curvature" or "taylor", both of the
    calibration text, or "magnitude" of the weights; refit: whether matrices are fitted anew on that text."""

    ratio: float
    importance: Literal["curvature", "taylor", "magnitude"] = "curvature"
    refit: bool = True

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. The first step finds out soon enough. After others, whose work would be in vain, it looks for
        heads and channels in the model as it came."""
        from ..module.units import find_blocks

        if outlook.steps:
            find_blocks(outlook.module)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: the text forward and back, and for each layer the inverse of a matrix of its channels."""
        from ..importance.influence import all_windows
        from ..module.units import find_blocks

        blocks = find_blocks(module)
        texts = all_windows(bench.token_ids, bench.context_length)
        details = self.cut(module, blocks, *self.measured(module, blocks, texts))
        reads = self.refit or self.importance != "magnitude"
        return Applied(module, {**details, **({"tokens": sum(ids.numel() for ids in texts)} if reads else {})})

    def cut(
        self, module: PreTrainedModel, blocks: list[Block], portions: list[list[Portion]], inputs: list[torch.Tensor]
    ) -> dict[str, Any]:
        """Prune in place, by what was `measured`. Returns details. Raises: RecipeError."""
        from ..module.linears import matrix_of, own

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
    ) -> tuple[list[list[Portion]], list[torch.Tensor]]:
        """Of each block: what may go, in order, and the second moment of what is read, where it is refitted."""
        from ..importance.curvature import find_moments, portions_by_curvature
        from ..importance.ranks import magnitudes, taylor
        from .low_rank import input_moments

        if self.importance == "curvature":
            found = find_moments(module, blocks, texts)
            portions = [
                portions_by_curvature(module, block, moments, _portion_sizes(block))
                for block, moments in zip(blocks, found, strict=True)
            ]
            return portions, [moments.inputs for moments in found]
        scores = magnitudes(module, blocks) if self.importance == "magnitude" else taylor(module, blocks, texts)
        moments = input_moments(module, [block.outer for block in blocks], texts) if self.refit else {}
        portions = [portions_by_score(block, score) for block, score in zip(blocks, scores, strict=True)]
        return portions, [moments[block.outer] for block in blocks] if self.refit else []


def portions_by_score(block: Block, score: torch.Tensor) -> list[Portion]:
    """What may go of a block, in the order of the units' scores, which add up to the harm."""
    from ..importance.curvature import Portion

    order, portions, end = score.argsort(), [], 0
    for size in _portion_sizes(block):
        units = order[end : end + size]
        portions.append(Portion(float(score[units].sum()), units.tolist()))
        end += size
    return portions


def choose_units(
    blocks: list[Block], portions: list[list[Portion]], costs: list[int], budget: float
) -> list[torch.Tensor]:
    """The units of each block that stay, in ascending order.

    portions: of each block, in the order in which they go; costs: parameters of each unit; budget: parameters that
    shall go. Raises: RecipeError where they cannot without emptying a layer.
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
            f"heads and channels can give {most:.0f} % of what ratio asks for, if each layer keeps one KV group and "
            f"{_CHANNELS} channels: lower the ratio"
        )
    return [_without(block.count, units) for block, units in zip(blocks, gone, strict=True)]


def _ranked(portions: list[list[Portion]], costs: list[int]) -> Iterator[tuple[float, int, list[int]]]:
    """Each portion: harm for each weight, number of the block, units. Within a block the harm never falls, so sorting
    never takes a later portion first."""
    for number, (cost, found) in enumerate(zip(costs, portions, strict=True)):
        most = 0.0
        for portion in found:
            most = max(most, portion.harm / (cost * len(portion.units)))
            yield most, number, portion.units


def _portion_sizes(block: Block) -> list[int]:
    """How many units go at a time: after each, a multiple of 16 channels is left, and at the end 16 to 31; or a KV
    group."""
    if block.kind == "attention":
        return [1] * (block.count - 1)
    size = max(1, block.count // (_CHANNELS * _PORTIONS)) * _CHANNELS
    first = block.count % _CHANNELS
    rest = max(0, (block.count - first - _CHANNELS) // size)
    return ([first] if first and rest else []) + [size] * rest


def _without(count: int, gone: list[int]) -> torch.Tensor:
    import torch

    left = torch.ones(count, dtype=torch.bool)
    left[gone] = False
    return left.nonzero().flatten()


def _fitted(
    module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor], inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The matrices that read what stays of a block, by name, of blocks that lose something."""
    from ..importance.curvature import refitted
    from ..module.linears import matrix_of, own

    return {
        block.outer: refitted(matrix_of(own(module, block.outer)), moment, block.columns(units))
        for block, units, moment in zip(blocks, kept, inputs, strict=True)
        if len(units) < block.count
    }


def _prune(module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor]) -> None:
    """Cut the matrices, and check that the answers are those of the whole model with the other units silenced. Raises:
    RecipeError where they are not, and the module is as it was."""
    from ..module.edits import KEY, edit, edits_of
    from ..module.units import keep_units, outer_inputs, probe_logits, same_logits

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
    except Exception as error:  # noqa: BLE001, modeling code that counts on the sizes that were fails in its own ways
        same, reason = False, f" ({error})"
    else:
        reason = ""
    if not same:
        for part, state in saved:
            vars(part).update(state)
        setattr(module.config, KEY, log)
        raise RecipeError(f"{type(module).__name__} does not compute as it should with fewer heads or channels{reason}")


def _shapes(module: PreTrainedModel, blocks: list[Block]) -> dict[str, list[int]]:
    from ..module.linears import own, shape_of

    return {name: list(shape_of(own(module, name))) for block in blocks for name in (*block.inner, block.outer)}


def _attributes(module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor]) -> dict[str, dict[str, int]]:
    """What attention modules' code reads of their sizes, by the modules' names."""
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
    """By layer: KV groups and channels before and after."""
    sizes: dict[str, dict[str, list[int]]] = {}
    for block, units in zip(blocks, kept, strict=True):
        what = "kv_groups" if block.kind == "attention" else "channels"
        sizes.setdefault(str(block.layer), {})[what] = [block.count, len(units)]
    return sizes
