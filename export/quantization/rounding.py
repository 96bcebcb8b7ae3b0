"""int8 matrices for `int8-rowwise` whose rounding errors later inputs make up for (GPTQ), computed once for an export.

They are kept as .npy files in the export's scratch folder, since the graph is written several times while it is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..passes.graph import nodes_of
from ..passes.linear import Weight, weight_of
from ..passes.quantize_linears import column_scales
from .gptq import gptq_columns
from .hessians import each_group_of_hessians


def round_matrices(
    graph: Path, texts: Sequence[Sequence[int]], context: int, limit: int, folder: Path
) -> Mapping[str, Path]:
    """Round the matrices of an fp32 graph, so that their products on the texts come out as exact as possible.

    graph: path of the fp32 graph; texts: token ids; context: of the model; limit: largest magnitude of a level, 127 or
    63; folder: where the files go. Returns: for the name of each matrix a file of int8 (inputs, outputs), in units of
    `column_scales`. Cost: as of `each_group_of_hessians` and `gptq_columns`. Raises: as of `each_group_of_hessians`.
    """
    weights = _weights(ir.load(graph))
    files: dict[str, Path] = {}
    for group in each_group_of_hessians(graph, texts, context):
        for name, hessian in group.items():
            array = np.ascontiguousarray(weights[name].array(), np.float32)
            files[name] = folder / f"rounded-{len(files)}.npy"
            np.save(files[name], gptq_columns(array, hessian, column_scales(array, limit), limit))
    return files


def _weights(model: ir.Model) -> dict[str, Weight]:
    found = (weight_of(matmul) for matmul in nodes_of(model, "MatMul"))
    return {weight.name: weight for weight in found if weight is not None}
