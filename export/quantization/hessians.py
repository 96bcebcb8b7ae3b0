"""The second moments of each matrix's inputs on a text, by which GPTQ weighs errors.

The fp32 graph runs on the CPU with the matrices' inputs as outputs, one group of matrices at a time, so that the
moments of a large model are not all in memory together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.errors import VerificationError
from ...runtime.host.ort import load_onnxruntime, mapped_errors
from ..codes.blocks import BlockQuantizer, BlockSettings
from ..errors import RecipeError
from ..passes.graph import nodes_of
from ..passes.linear import weight_of

_PROBE = "hessians.onnx"
_WINDOW = 512
_MOST_WINDOWS = 16
_BATCH = 4  # windows that run together
_GROUP_BYTES = 1 << 30

Hessians = dict[str, NDArray[np.float32]]


def collect_hessians(graph: Path, token_ids: Sequence[int], context: int) -> Hessians:
    """All results of `each_group_of_hessians` for one text."""
    return {name: sums for group in each_group_of_hessians(graph, [token_ids], context) for name, sums in group.items()}


def each_group_of_hessians(graph: Path, texts: Sequence[Sequence[int]], context: int) -> Iterator[Hessians]:
    """{name of a matrix: mean of x xᵀ, (inputs, inputs) float32} over its input rows x on the texts (token ids), in
    groups of up to 1 GiB.

    graph: path of the fp32 graph; a temporary probe is written beside it. A matrix that several products share gets the
    mean over all their rows. Cost: one run of up to 8,192 tokens with the fp32 graph for each group. Raises:
    RecipeError, where attention is not fused; VerificationError, where x is not finite; SessionError.
    """
    pieces = _pieces(texts, min(_WINDOW, context))
    for group in _groups(_inputs_of_matrices(ir.load(graph))):
        values = list(dict.fromkeys(value for _, read in group.values() for value in read))
        try:
            sums = _sums(graph, values, pieces)
        finally:
            (graph.parent / _PROBE).unlink(missing_ok=True)
        yield {name: _mean([sums[value] for value in read], name) for name, (_, read) in group.items()}


def _pieces(texts: Sequence[Sequence[int]], window: int) -> list[Sequence[int]]:
    """Windows of the texts in turns, so that a long text does not displace the others."""
    cut = [[text[begin : begin + window] for begin in range(0, len(text), window)] for text in texts]
    turns = (piece for turn in itertools.zip_longest(*cut) for piece in turn if piece is not None)
    return list(itertools.islice(turns, _MOST_WINDOWS))


def make_block_quantizer(
    settings: BlockSettings, graph: Path, token_ids: Sequence[int], context: int
) -> BlockQuantizer:
    """A quantizer with the hessians that its method needs. Arguments, cost and errors as of `collect_hessians`; only
    GPTQ costs anything."""
    if settings.method != "gptq":
        return BlockQuantizer(settings)
    return BlockQuantizer(settings, collect_hessians(graph, token_ids, context))


def _inputs_of_matrices(model: ir.Model) -> dict[str, tuple[int, list[str]]]:
    """{name of a matrix: its number of inputs, and the names of its input values}."""
    found: dict[str, tuple[int, list[str]]] = {}
    for matmul in nodes_of(model, "MatMul"):
        weight, source = weight_of(matmul), matmul.inputs[0]
        if weight is not None and source is not None and source.name is not None:
            found.setdefault(weight.name, (weight.shape[0], []))[1].append(source.name)
    return found


def _groups(matrices: Mapping[str, tuple[int, list[str]]]) -> Iterator[dict[str, tuple[int, list[str]]]]:
    group: dict[str, tuple[int, list[str]]] = {}
    size = 0
    for name, (inputs, values) in matrices.items():
        if group and size + 4 * inputs * inputs > _GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = inputs, values
        size += 4 * inputs * inputs
    if group:
        yield group


def _mean(parts: Sequence[NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    if not all(np.isfinite(part).all() for part in parts):
        raise VerificationError(
            f"the inputs of {name} are not all finite numbers on the calibrating text: the weights are damaged, or the "
            "model computes beyond the range of float32"
        )
    return parts[0] if len(parts) == 1 else np.asarray(sum(parts) / np.float32(len(parts)), np.float32)


def _sums(graph: Path, values: list[str], pieces: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    model = ir.load(graph)
    produced = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [produced[name] for name in values]
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.save(model, graph.parent / _PROBE)
    with mapped_errors("the inputs of the matrices cannot be computed", "export the model with another method"):
        session = load_onnxruntime().InferenceSession(graph.parent / _PROBE, providers=["CPUExecutionProvider"])
        sums: dict[str, NDArray[np.float32]] = {}
        count = 0
        for batch in _batches(pieces):
            for name, rows in zip(values, session.run(values, _feeds(session, batch)), strict=True):
                flat = np.asarray(rows, np.float32).reshape(-1, rows.shape[-1])
                if name not in sums:
                    sums[name] = np.zeros((flat.shape[1],) * 2, np.float32)
                sums[name] += flat.T @ flat
            count += batch.size
    return {name: total / np.float32(count) for name, total in sums.items()}


def _batches(pieces: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int64]]:
    """Pieces of equal length as batches: few large products with the transposed rows take two thirds of the time of
    many small ones."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    for alike in by_length.values():
        for begin in range(0, len(alike), _BATCH):
            yield np.array(alike[begin : begin + _BATCH], np.int64)


def _feeds(session: Any, batch: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The graph's inputs for a batch (rows, tokens) with empty caches."""
    rows = len(batch)
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": batch,
        "attention_mask": np.ones_like(batch),
        "logits_to_keep": np.zeros(1, np.int64),
    }
    for item in session.get_inputs():
        if item.name not in feeds:
            if len(item.shape) != 4:
                raise RecipeError("gptq needs a model whose only states are keys and values: use rtn or hqq")
            feeds[item.name] = np.zeros(
                (rows, *(size if isinstance(size, int) else 0 for size in item.shape[1:])), np.float32
            )
    return {item.name: feeds[item.name] for item in session.get_inputs()}
