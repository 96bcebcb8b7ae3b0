"""Rotary embeddings that depend on the length of the whole text, such as longrope and dynamic NTK.

A cached key was rotated for the length at that time, and graphs read cosines and sines from tables. So the context of a
bundle ends where such a rotation begins to change. That length is found by calling the model's own modules for one
position in texts of several lengths; no kind is known by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_POSITIONS = "position_ids"
_LAYER_TYPE = "layer_type"
# The position whose rotation is compared: at 0 nothing rotates.
_AT = 1
_SHORTEST = 2


def steady_length(module: PreTrainedModel, context_length: int) -> int:
    """The longest text, of up to `context_length` tokens, in which no rotation depends on the text's length.

    Cost: some 40 calls of each rotary embedding, for two positions each.
    """
    longest = context_length
    for rotation in _rotations(module):
        longest = _last_like_short(rotation, longest)
    return longest


def rotation_name(module: PreTrainedModel) -> str:
    """The rotation's name in the configuration, for messages."""
    config: Any = module.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    names = sorted({str(kind["rope_type"]) for kind in kinds if kind.get("rope_type", "default") != "default"})
    return f"rope_type {' and '.join(map(repr, names))}" if names else "of an unnamed kind"


def _last_like_short(rotation: Callable[[int], torch.Tensor], longest: int) -> int:
    """Bisect: a rotation that has changed stays changed."""
    import torch

    short = rotation(_SHORTEST)
    if longest <= _SHORTEST or torch.equal(rotation(longest), short):
        return longest
    good, bad = _SHORTEST, longest
    while bad - good > 1:
        middle = (good + bad) // 2
        if torch.equal(rotation(middle), short):
            good = middle
        else:
            bad = middle
    return good


def _rotations(module: PreTrainedModel) -> Iterator[Callable[[int], torch.Tensor]]:
    """For each rotary embedding, and each type of layer that it serves, the rotation of one position by the text's
    length. transformers' rotary embeddings have no weights, and take what they rotate and its positions."""
    for part in module.modules():
        known = list(inspect.signature(part.forward).parameters)
        if known[1:2] != [_POSITIONS] or known[2:] not in ([], [_LAYER_TYPE]) or any(True for _ in part.parameters()):
            continue
        kinds = getattr(part, "rope_type", None) if known[2:] else None
        for kind in sorted(kinds) if isinstance(kinds, dict) else [None]:
            yield _asker(part, kind)


def _asker(part: torch.nn.Module, kind: str | None) -> Callable[[int], torch.Tensor]:
    import torch

    extra = {} if kind is None else {_LAYER_TYPE: kind}

    def ask(length: int) -> torch.Tensor:
        positions = torch.tensor([[_AT, length - 1]])
        with torch.no_grad():
            # On a copy, since some remember the longest length.
            found = copy.deepcopy(part)(torch.zeros(1, 2, 1), position_ids=positions, **extra)
        parts = found if isinstance(found, tuple) else (found,)
        return torch.cat([torch.view_as_real(item) if item.is_complex() else item for item in parts], -1)[:, 0]

    return ask
