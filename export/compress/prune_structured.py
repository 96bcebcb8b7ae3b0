"""`prune-structured`: leave out attention heads, whole KV groups of them, and channels of MLPs: smaller matrices, which
every kernel runs faster.

All heads and channels of the model are ranked together, by importance for each weight that they cost, and the least
important go until the budget is met. So layers end up unlike each other; in each, one KV group and some channels stay.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RecipeError
from .steps import Applied, Outlook, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .units import Block

# Channels go by so many, and as many stay: integer kernels pack columns by 16.
_CHANNELS = 16
# Attributes in which attention modules keep their sizes, where they do.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("split_size", "embed_dim", "hidden_size")


@dataclass(frozen=True)
class PruneStructured:
    """ratio: share of the whole model's parameters that goes; importance: "taylor", of the calibration text, or
    "magnitude" of the weights."""

    ratio: float
    importance: Literal["taylor", "magnitude"] = "taylor"

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        if not 0 < self.ratio < 1:
            raise RecipeError(f"ratio must be between 0 and 1, found {self.ratio:g}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. The first step finds out soon enough. After others, whose work would be in vain, it looks for
        heads and channels in the model as it came."""
        from .units import find_blocks

        if outlook.steps:
            find_blocks(outlook.module)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        from .importance import magnitudes, taylor
        from .units import find_blocks

        blocks = find_blocks(module)
        if self.importance == "taylor":
            scores = taylor(module, blocks, bench.token_ids, bench.context_length)
        else:
            scores = magnitudes(module, blocks)
        costs = [block.parameters(module) for block in blocks]
        before = module.num_parameters()
        kept = choose_units(blocks, scores, costs, self.ratio * before)
        _prune(module, blocks, kept)
        removed = 100 * (1 - module.num_parameters() / before)
        return Applied(module, {"removed_percent": round(removed, 2), "layers": _sizes(blocks, kept)})


def choose_units(
    blocks: list[Block], scores: list[torch.Tensor], costs: list[int], budget: float
) -> list[torch.Tensor]:
    """The units of each block that stay, in ascending order.

    scores: of each unit; costs: parameters of each unit; budget: parameters that shall go. Raises: RecipeError where
    they cannot without emptying a layer.
    """
    portions: list[tuple[float, int, int, list[int]]] = []
    for number, (block, score) in enumerate(zip(blocks, scores, strict=True)):
        order = [int(unit) for unit in score.argsort()]
        sizes = [1] * (block.count - 1) if block.kind == "attention" else _portions(block.count)
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            units = order[end - size : end]
            # An earlier portion of a block has a lower value, so sorting never takes a later one first.
            portions.append((float(score[units].mean()) / costs[number], number, end, units))
    gone: list[list[int]] = [[] for _ in blocks]
    removed = 0.0
    for _, number, _, units in sorted(portions):
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


def _portions(channels: int) -> list[int]:
    """Sizes in which channels go: after each, a multiple of 16 is left, and 16 at the end."""
    first = channels % _CHANNELS
    rest = max(0, channels // _CHANNELS - 1)
    return ([first] if first and rest else []) + [_CHANNELS] * rest


def _without(count: int, gone: list[int]) -> torch.Tensor:
    import torch

    left = torch.ones(count, dtype=torch.bool)
    left[gone] = False
    return left.nonzero().flatten()


def _prune(module: PreTrainedModel, blocks: list[Block], kept: list[torch.Tensor]) -> None:
    """Cut the matrices, and check that the answers are those of the whole model with the other units silenced. Raises:
    RecipeError where they are not, and the module is as it was."""
    from .edits import KEY, edit, edits_of
    from .units import keep_units, outer_inputs, probe_logits, same_logits

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
    from .linears import own, shape_of

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
