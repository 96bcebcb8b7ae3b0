"""`weights-int4`: 4-bit weights in blocks, with float activations. The smallest bundle, at a cost in quality.

The step does not change the weights. It notes its settings in the module's configuration, which a compressed folder
keeps, and the graph is quantized accordingly. An export of such a model has the scheme `int4-weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...codes.blocks import BLOCK_SCHEMES, BLOCK_SIZES, METHODS, BlockSettings, Method
from ...errors import RecipeError
from ..step import Applied, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEME = "int4-weight"
_KEY = "edgelm_weights"


@dataclass(frozen=True)
class WeightsInt4:
    """method: rounding method, see `codes.blocks`; block: number of inputs that share a scale."""

    method: Method = "rtn"
    block: Literal[32, 64, 128] = 32

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        if noted_weights(module) is not None:
            raise RecipeError("weights-int4 was already applied to this model: remove this step")
        setattr(module.config, _KEY, {"method": self.method, "block": self.block})
        return Applied(module)


def noted_weights(module: PreTrainedModel) -> BlockSettings | None:
    """Settings noted in a module's configuration; None without a note. Raises: RecipeError for an invalid note."""
    note: Any = getattr(module.config, _KEY, None)
    if note is None:
        return None
    known = isinstance(note, dict) and note.get("method") in METHODS and note.get("block") in BLOCK_SIZES
    if not known:
        raise RecipeError(f"config.json: {_KEY} is {note!r}, which no step writes: compress the model again")
    return BlockSettings(BLOCK_SCHEMES[SCHEME].bits, note["block"], note["method"])


def require_agreement(asked: str | None, why: str) -> None:
    """Raise RecipeError if `asked` is another scheme than `int4-weight`. why: what asks for 4-bit weights, for the
    message."""
    if asked not in (None, SCHEME):
        raise RecipeError(f"{why} asks for the scheme {SCHEME}, and --scheme says {asked}: leave one of them out")
