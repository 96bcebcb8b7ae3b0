"""`weights-int4`: weights of 4 bits in blocks, with float activations. The smallest bundle, at a price in quality.

Nothing is changed in the module: what is to be done with its weights is noted in its configuration, which a compressed
folder keeps, and done when the graph is quantized. An export of such a model has the scheme `int4-weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import RecipeError
from ...quantization.blocks import BLOCK_SCHEMES, BLOCK_SIZES, METHODS, BlockSettings, Method
from ..step import Applied, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEME = "int4-weight"
_KEY = "edgelm_weights"


@dataclass(frozen=True)
class WeightsInt4:
    """method: how weights become 4 bits, see `quantization.blocks`; block: how many inputs share a scale."""

    method: Method = "rtn"
    block: Literal[32, 64, 128] = 32

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        if noted_weights(module) is not None:
            raise RecipeError("weights-int4 was applied to this model before: a model has one type of weights")
        setattr(module.config, _KEY, {"method": self.method, "block": self.block})
        return Applied(module)


def noted_weights(module: PreTrainedModel) -> BlockSettings | None:
    """What a step noted in a module's configuration, or None. Raises: RecipeError, for a note that is none of ours."""
    note: Any = getattr(module.config, _KEY, None)
    if note is None:
        return None
    known = isinstance(note, dict) and note.get("method") in METHODS and note.get("block") in BLOCK_SIZES
    if not known:
        raise RecipeError(f"config.json: {_KEY} is {note!r}, which no step writes: compress the model again")
    return BlockSettings(BLOCK_SCHEMES[SCHEME].bits, note["block"], note["method"])


def require_agreement(asked: str | None, why: str) -> None:
    """Raise RecipeError if another scheme was asked for than the one that 4-bit weights have. why: where these come
    from."""
    if asked not in (None, SCHEME):
        raise RecipeError(f"{why} asks for the scheme {SCHEME}, and --scheme says {asked}: leave one of them out")
