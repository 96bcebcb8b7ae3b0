"""Find the zeros that `prune-magnitude` made, which must stay zero in a training.

A model may also have zeros of its own (the embedding of a real model has thousands), which are trained like other
weights. So the model's earlier steps decide, not a count of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...source.compressed import read_record, settings_of

if TYPE_CHECKING:
    import torch

_PRUNES = "prune-magnitude"


def was_pruned(steps: Iterable[Mapping[str, Any]], folders: Iterable[Path] = ()) -> bool:
    """Whether `prune-magnitude` is among these steps or in the record of a model in one of the folders."""
    records = [read_record(folder) for folder in folders if folder.is_dir()]
    earlier = [settings_of(step) for record in records if record is not None for step in record.steps]
    return any(step.get("use") == _PRUNES for step in (*steps, *earlier))


def pruned_zeros(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameter name -> mask of the zeros, for the matrices of a pruned model's linear layers. A head tied to the
    embedding is left out: it was not pruned."""
    import torch

    from ...module.linears import is_linear

    parts: list[Any] = list(module.modules())
    matrices = {id(part.weight) for part in parts if is_linear(part)}
    matrices -= {id(part.weight) for part in parts if isinstance(part, torch.nn.Embedding)}
    found = {name: weight == 0 for name, weight in module.named_parameters() if id(weight) in matrices}
    return {name: where for name, where in found.items() if bool(where.any())}
