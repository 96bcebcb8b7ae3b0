"""Round the matrices of the row-wise schemes by GPTQ, once for an export.

The results are files in the export's scratch folder, since the graph is written several times while it is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.host import machine
from ..codes.gptq import gptq_columns
from ..codes.nibbles import round_nibbles, save_nibbles
from ..passes.graph import nodes_of
from ..passes.linear import Weight, weight_of
from ..passes.quantize_embedding import tables_of
from ..passes.quantize_linears import column_scales
from .hessians import each_group_of_hessians

# The most matrices to round at the same time: each takes four times the memory of its float32 Hessian.
_MOST_AT_ONCE = 4


def round_matrices(
    graph: Path, texts: Sequence[Sequence[int]], context: int, limit: int, folder: Path
) -> Mapping[str, Path]:
    """Round the matrices of an fp32 graph so that their products on the texts are as exact as possible.

    graph: path of the fp32 graph; texts: token ids; context: of the model; limit: largest magnitude of a level, 127 or
    63; folder: where the files go. Returns: for the name of each matrix a file of int8 (inputs, outputs), in units of
    `column_scales`. Cost: as of `each_group_of_hessians` and `gptq_columns`. Raises: as of `each_group_of_hessians`.
    """
    weights = _weights(ir.load(graph))
    files = {name: folder / f"rounded-{index}.npy" for index, name in enumerate(weights)}

    def round_one(name: str, hessian: NDArray[np.float32]) -> None:
        array = np.ascontiguousarray(weights[name].array(), np.float32)
        np.save(files[name], gptq_columns(array, hessian, column_scales(array, limit), limit))

    _round_each(round_one, weights, graph, texts, context)
    return files


def round_to_nibbles(
    graph: Path, texts: Sequence[Sequence[int]], context: int, limit: int, folder: Path, *, widths: Sequence[int]
) -> Mapping[int, Mapping[str, Path]]:
    """The same with fewer bits, for each of the widths: files of `save_nibbles`. An embedding that no product reads is
    rounded to the nearest; without texts, so is every matrix. Cost: as of `round_nibbles`, each."""
    model = ir.load(graph)
    weights = _weights(model)
    multiplied = list(weights)
    weights |= {weight.name: weight for weight in tables_of(model) if weight.name not in weights}
    files = {
        bits: {name: folder / f"nibbles-{bits}-{index}.npz" for index, name in enumerate(weights)} for bits in widths
    }

    def round_one(name: str, hessian: NDArray[np.float32] | None = None) -> None:
        array = np.ascontiguousarray(weights[name].array(), np.float32)
        for bits in widths:
            save_nibbles(round_nibbles(array, hessian, limit, bits), files[bits][name])

    if texts:
        _round_each(round_one, weights, graph, texts, context)
    for name in weights:
        if not texts or name not in multiplied:
            round_one(name)
    return files


def _round_each(
    round_one: Callable[[str, NDArray[np.float32]], None],
    weights: Mapping[str, Weight],
    graph: Path,
    texts: Sequence[Sequence[int]],
    context: int,
) -> None:
    from threadpoolctl import threadpool_limits

    # Several matrices at once: half of the work is numpy on single rows, which uses one core. Each matrix has one
    # thread: its products are small, and threads that wait for each other take 1.6 times as long.
    with ThreadPoolExecutor(min(machine.default_threads(), _MOST_AT_ONCE)) as pool:
        for group in each_group_of_hessians(graph, texts, context):
            # The costliest first, so that no long one runs alone at the end.
            names = sorted(group, key=lambda name: -(len(group[name]) ** 2) * weights[name].shape[1])
            with threadpool_limits(1, user_api="blas"):
                list(pool.map(round_one, names, [group[name] for name in names]))


def _weights(model: ir.Model) -> dict[str, Weight]:
    found = (weight_of(matmul) for matmul in nodes_of(model, "MatMul"))
    return {weight.name: weight for weight in found if weight is not None}
