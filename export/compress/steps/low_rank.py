"""`low-rank`: replace a matrix by two factors, with a truncated singular value decomposition.

With W = U S V^T, the first r columns of U sqrt(S) and the first r rows of sqrt(S) V^T are the best approximation of W
of rank r. With `weighted` they are the best approximation of W's outputs on the calibration text: W L is decomposed,
where L L^T is the second moment of W's inputs, and the right factor is multiplied by L^-1 (Wang et al., SVD-LLM, arXiv
2403.07378).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError
from ..progress import tracked
from ..step import Applied, Outlook, Workbench

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# Added to the second moment's diagonal, relative to its mean: the moment is singular if the text has fewer directions
# than there are inputs.
_DAMPING = 1e-4


@dataclass(frozen=True)
class LowRank:
    """matrices: shell patterns of the names of linear layers inside decoder layers; ratio: share of each matrix's
    weights to remove; energy: share of the sum of squared singular values to keep, with the smallest rank that does.
    Give either ratio or energy. weighted: minimize the error of outputs on the calibration text, not of weights."""

    matrices: tuple[str, ...] = ("*",)
    ratio: float | None = None
    energy: float | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        given = {key: value for key in ("ratio", "energy") if (value := getattr(self, key)) is not None}
        if len(given) != 1:
            raise RecipeError(f"give one of ratio and energy, found {', '.join(given) or 'none'}")
        for key, value in given.items():
            if not 0 < value < 1:
                raise RecipeError(f"{key} must be between 0 and 1, found {value:g}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. The names are checked on the source: no step renames a matrix that it keeps whole."""
        self._chosen(outlook.module)

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`. Cost: a decomposition of each matrix, and with `weighted` eight windows of the text per layer.
        Memory: second moments of one layer's inputs at a time."""
        from ...module.edits import edit
        from ...module.linears import own, require_unshared
        from ..importance.influence import windows
        from ..importance.moments import input_moments

        texts = windows(bench.token_ids, bench.context_length)
        layers = self._chosen(module)
        require_unshared(module, list(layers), "low-rank")
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        left = []
        for index in tracked(sorted(set(layers.values())), "layers factored"):
            names = [name for name, layer in layers.items() if layer == index]
            moments = input_moments(module, names, texts) if self.weighted else {}
            for name in names:
                found = self._factors(own(module, name), moments.get(name))
                if found is None:
                    left.append(name)
                else:
                    factors[name] = found
        ranks = {name: int(narrow.shape[0]) for name, (_, narrow) in factors.items()}
        edit(module, "factor", ranks=ranks)
        for name, (wide, narrow) in factors.items():
            factored: Any = own(module, name)
            factored.wide.weight.data, factored.narrow.weight.data = wide, narrow
        return Applied(module, {"ranks": ranks, "left_alone": left, **_note(left, layers)})

    def _chosen(self, module: PreTrainedModel) -> dict[str, int]:
        """Name of each linear layer that a pattern matches -> index of its decoder layer. Raises: RecipeError if a
        pattern matches none."""
        from ...module.linears import layer_linears

        there = layer_linears(module)
        for pattern in self.matrices:
            if not fnmatch.filter(there, pattern):
                names = sorted({name.rsplit(".", 1)[-1] for name in there})
                raise RecipeError(
                    f"no plain linear layer inside the decoder layers has a name like {pattern}: the model has "
                    f"{', '.join(names) or 'none'}" + (f", such as {next(iter(there))}" if there else "")
                )
        return {name: i for name, i in there.items() if any(fnmatch.fnmatch(name, item) for item in self.matrices)}

    def _factors(self, linear: Any, moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Factors wide (outputs, rank) and narrow (rank, inputs); None if they would not be smaller than the matrix."""
        import torch

        from ...module.linears import matrix_of

        matrix = matrix_of(linear)
        root = None if moment is None else _root(moment)
        left, values, right = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
        rank = self._rank(values, *matrix.shape)
        if rank is None:
            return None
        scale = values[:rank].sqrt()
        narrow = scale[:, None] * right[:rank]
        if root is not None:
            narrow = torch.linalg.solve_triangular(root, narrow, upper=False, left=False)
        return (left[:, :rank] * scale).contiguous(), narrow.contiguous()

    def _rank(self, values: torch.Tensor, outputs: int, inputs: int) -> int | None:
        if self.ratio is not None:
            rank = int((1 - self.ratio) * outputs * inputs / (outputs + inputs))
        else:
            assert self.energy is not None, "one of the two is given"
            shares = values.double().square().cumsum(0)
            rank = int((shares < self.energy * shares[-1]).sum()) + 1
        return rank if rank > 0 and rank * (outputs + inputs) < outputs * inputs else None


def _root(moment: torch.Tensor) -> torch.Tensor:
    """Cholesky factor L, lower triangular, of the damped moment."""
    import torch

    wide = moment.double()
    damping = _DAMPING * wide.diagonal().mean().clamp(min=1e-12)
    damped = wide + damping * torch.eye(len(wide), dtype=torch.float64)
    root: torch.Tensor = torch.linalg.cholesky(damped).to(moment.dtype)
    return root


def _note(left: list[str], chosen: dict[str, int]) -> dict[str, str]:
    if not left:
        return {}
    return {"note": f"{len(left)} of {len(chosen)} matrices stay whole: their factors would not be smaller"}
