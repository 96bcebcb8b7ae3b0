"""Graph passes, one rule a file, and the order in which they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..codes.blocks import BlockQuantizer
from .call_attention import CallAttention
from .drop_reshapes import DropReshapes
from .drop_zeros import DropZeros
from .fold_constants import FoldConstants
from .fuse_biases import FuseBiases
from .fuse_into_products import FuseIntoProducts
from .fuse_norms import FuseRMSNorm
from .fuse_residual_norms import FuseResidualNorms
from .keep_last_logits import KeepLastLogits
from .keep_on_host import KeepOnHost
from .keep_rows import KeepRows
from .lower_positions import LowerPositions
from .merge_linears import MergeLinears
from .narrow_weights import NarrowWeights
from .norm_in_attention import NormInAttention
from .normalize_linears import NormalizeLinears
from .pack_attention_inputs import PackAttentionInputs
from .pick_tokens import PickTokens
from .quantize_blocks import QuantizeBlocks
from .quantize_cache import QuantizeCache
from .quantize_embedding import QuantizeEmbedding
from .quantize_linears import ROWWISE_SCHEMES, QuantizeLinears
from .rotate_in_attention import RotateInAttention
from .to_float16 import ToFloat16
from .widen_activations import WidenActivations

__all__ = ["fusing_passes", "narrowing_passes", "quantizing_passes"]
_PLAIN = ("fp32", "fp16")


def fusing_passes(context_length: int) -> list[ir.passes.PassBase]:
    """Passes from the traced graph to the fp32 graph, in order. Each pass relies on those before it."""
    return [
        FoldConstants(),
        DropZeros(),
        NormalizeLinears(),
        FuseRMSNorm(),
        FuseResidualNorms(),
        RotateInAttention(context_length),
        DropReshapes(),
        PackAttentionInputs(),
        LowerPositions(context_length),
        MergeLinears(),
        KeepLastLogits(),
        FoldConstants(),
    ]


def quantizing_passes(
    scheme: str,
    weight_bits: int,
    cache_ranges: Mapping[str, Any],
    excluded: Collection[str] = (),
    blocks: BlockQuantizer | None = None,
    *,
    rounded: Mapping[str, Path] | None = None,
    wide: Collection[str] = (),
    narrow: Mapping[str, Path] | None = None,
) -> list[ir.passes.PassBase]:
    """Passes from the fp32 graph to the one that ships, in order. cache_ranges: empty for a float32 cache; excluded:
    names of matrices that stay float32; blocks: for schemes that store weights in blocks; rounded: files of int8
    matrices that were rounded by GPTQ; wide: names of matrices whose activations have 16 bits; narrow: files of
    matrices with 4 to 6 bits (row-wise schemes)."""
    limit = (1 << (weight_bits - 1)) - 1
    passes: list[ir.passes.PassBase] = []
    if blocks is not None:
        passes.append(QuantizeBlocks(blocks, excluded))
    elif scheme not in _PLAIN:
        passes += [QuantizeLinears(scheme, limit, excluded, rounded), QuantizeEmbedding(limit, excluded, rounded)]
        passes += [FuseIntoProducts(), FuseBiases(), KeepRows()]
    if cache_ranges:
        passes.append(QuantizeCache(cache_ranges))
    if cache_ranges or scheme in ROWWISE_SCHEMES:
        passes += [CallAttention(), NormInAttention()]
    if narrow:
        passes.append(NarrowWeights(narrow))
    if wide:
        passes.append(WidenActivations(wide))
    return passes


def narrowing_passes() -> list[ir.passes.PassBase]:
    """Passes from a graph with float32 activations to one for a GPU, in order."""
    return [ToFloat16(), PickTokens(), KeepOnHost()]
