"""Graph passes, one rule a file, and the order in which they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from .drop_reshapes import DropReshapes
from .drop_zeros import DropZeros
from .fold_constants import FoldConstants
from .fuse_norms import FuseRMSNorm
from .fuse_residual_norms import FuseResidualNorms
from .keep_last_logits import KeepLastLogits
from .lower_positions import LowerPositions
from .merge_linears import MergeLinears
from .normalize_linears import NormalizeLinears
from .pack_attention_inputs import PackAttentionInputs
from .quantize_cache import QuantizeCache
from .quantize_embedding import QuantizeEmbedding
from .quantize_linears import QuantizeLinears
from .rotate_in_attention import RotateInAttention

__all__ = ["fusing_passes", "quantizing_passes"]


def fusing_passes(context_length: int) -> list[ir.passes.PassBase]:
    """From the graph as it was traced to the fp32 graph that runs. Each pass works on what those before it made."""
    return [
        FoldConstants(),
        DropZeros(),
        NormalizeLinears(),
        FuseRMSNorm(),
        FuseResidualNorms(),
        RotateInAttention(context_length),
        DropReshapes(),
        PackAttentionInputs(),
        LowerPositions(),
        MergeLinears(),
        KeepLastLogits(),
        FoldConstants(),
    ]


def quantizing_passes(
    scheme: str, weight_bits: int, cache_ranges: Mapping[str, Any], excluded: Collection[str] = ()
) -> list[ir.passes.PassBase]:
    """From the fp32 graph to the one that ships. cache_ranges: empty for a float32 cache; excluded: names of matrices
    that stay float32."""
    limit = (1 << (weight_bits - 1)) - 1
    passes: list[ir.passes.PassBase] = []
    if scheme != "fp32":
        passes += [QuantizeLinears(scheme, limit, excluded), QuantizeEmbedding(limit, excluded)]
    if cache_ranges:
        passes.append(QuantizeCache(cache_ranges))
    return passes
