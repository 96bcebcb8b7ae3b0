"""Bytes of a module's weights in its bundle, computed without an export.

The count includes the quantized matrices with their scales (a shared matrix once), all other weights and the rotation
tables in the activation type, and the scales of an INT8 KV cache. It leaves out graph constants of a few hundred bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...targets import Profile
from ...targets.abilities import MIXED_SCHEME
from ..codes.blocks import BLOCK_SCHEMES, BlockSettings
from ..codes.nibbles import BLOCK
from ..errors import RecipeError
from .steps.weights_int4 import SCHEME, noted_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALE = 4  # bytes


def weight_bytes(module: PreTrainedModel, profile: Profile, context_length: int) -> int:
    """Bytes of the weights in the bundle for this target, in its scheme or in that of `weights-int4` if it was applied.

    context_length: in tokens.
    """
    noted = noted_weights(module)
    scheme = profile.scheme if noted is None else SCHEME
    plain = 2 if profile.activations == "float16" else 4
    matrices = _matrices(module)
    tables, scales = _beside_weights(module, context_length, scales=profile.kv.get(scheme) == "int8")
    total = plain * tables + _SCALE * scales
    for key, weight in {id(weight): weight for weight in module.parameters()}.items():
        if key not in matrices or scheme in ("fp32", "fp16"):
            total += plain * weight.numel()
            continue
        (inputs, outputs), is_table = matrices[key]
        count = weight.numel() // (inputs * outputs)
        blocks = noted or BLOCK_SCHEMES.get(scheme)
        if blocks is not None:
            total += count * outputs * _column_in_blocks(inputs, blocks, plain, zero_points=not is_table)
        else:
            total += count * outputs * _column_by_row(inputs, narrow=scheme == MIXED_SCHEME and not is_table)
    return total


def _matrices(module: PreTrainedModel) -> dict[int, tuple[tuple[int, int], bool]]:
    """id of each weight matrix -> (inputs, outputs), and whether it is the input embedding.

    Other embedding tables, such as learned positions, are left out.
    """
    from ..module.linears import is_linear, shape_of

    whole: Any = module
    embedding = whole.get_input_embeddings()
    tables = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    found = {id(weight): (_last_two(weight), False) for weight in module.parameters() if weight.dim() in (2, 3)}
    found = {key: value for key, value in found.items() if key not in tables}
    for part in module.modules():
        if is_linear(part):
            outputs, inputs = shape_of(part)
            found[id(part.weight)] = ((inputs, outputs), False)
    if isinstance(embedding, torch.nn.Embedding):
        rows, columns = embedding.weight.shape
        found[id(embedding.weight)] = ((columns, rows), True)
    return found


def _last_two(weight: torch.Tensor) -> tuple[int, int]:
    """(inputs, outputs) of a matrix (outputs, inputs) or of each matrix in a stack."""
    outputs, inputs = weight.shape[-2:]
    return int(inputs), int(outputs)


def _column_in_blocks(inputs: int, blocks: BlockSettings, plain: int, *, zero_points: bool) -> int:
    """Bytes of a column in blocks. Each block has a scale, and with `zero_points` a zero point."""
    count = -(-inputs // blocks.block)
    zeros = -(-count * blocks.bits // 8) if zero_points else 0
    return count * (blocks.block * blocks.bits // 8 + plain) + zeros


def _column_by_row(inputs: int, *, narrow: bool) -> int:
    """Bytes of a column in the row-wise schemes. narrow: 4 bits a weight."""
    return (-(-inputs // BLOCK) * (BLOCK // 2 + 1) if narrow else inputs) + _SCALE


def _beside_weights(module: PreTrainedModel, context_length: int, *, scales: bool) -> tuple[int, int]:
    """Numbers in the rotation tables (cosine and sine for context_length + 1 positions), and scales of an INT8 KV
    cache, one per channel.

    Both are 0 if the attention modules cannot be found. A table counts only if whole heads are rotated and the head
    size is a multiple of 16.
    """
    from ..module.structure import attention_calls

    try:
        calls = attention_calls(module).values()
    except RecipeError:
        return 0, 0
    frequencies: list[Any] = [getattr(part, "inv_freq", None) for part in module.modules()]
    widths = [item.numel() for item in frequencies if isinstance(item, torch.Tensor)]
    whole = {call.key_size for call in calls if call.key_size % 16 == 0}
    tables = 2 * (context_length + 1) * sum(width for width in widths if 2 * width in whole)
    return tables, sum(call.kv_heads * (call.key_size + call.value_size) for call in calls) if scales else 0
