"""The second moments of each matrix's inputs on a text, by which GPTQ weighs errors.

The fp32 graph runs on the CPU in parts, one for each group of matrices, so that the moments of a large model are not
all in memory together. A part's outputs are the inputs of its matrices, and what the next part needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
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
_GROUP_BYTES = 1 << 29

Hessians = dict[str, NDArray[np.float32]]


def collect_hessians(graph: Path, token_ids: Sequence[int], context: int) -> Hessians:
    """All results of `each_group_of_hessians` for one text."""
    return {name: sums for group in each_group_of_hessians(graph, [token_ids], context) for name, sums in group.items()}


def each_group_of_hessians(graph: Path, texts: Sequence[Sequence[int]], context: int) -> Iterator[Hessians]:
    """{name of a matrix: mean of x xᵀ, (inputs, inputs) float32} over its input rows x on the texts (token ids), in
    groups of up to 512 MiB.

    graph: path of the fp32 graph; a temporary probe is written beside it. A matrix that several products share gets the
    mean over all their rows. Cost: one run of up to 8,192 tokens with the fp32 graph. Memory: a group, and the hidden
    states of these tokens. Raises: RecipeError, where attention is not fused; VerificationError, where x is not finite;
    SessionError.
    """
    model = ir.load(graph)
    groups = list(_groups(_inputs_of_matrices(model)))
    wanted = [list(dict.fromkeys(value for _, read in group.values() for value in read)) for group in groups]
    run = _Run(model, graph.parent / _PROBE, _pieces(texts, min(_WINDOW, context)))
    for index, group in enumerate(groups):
        later = {name for values in wanted[index + 1 :] for name in values}
        sums = run.sums(wanted[index], later)
        yield {name: _mean([sums[value] for value in read], name) for name, (_, read) in group.items()}


class _Run:
    """The fp32 graph on windows of text, a group of values at a time. Each group begins with the values that the ones
    before it left, so that no node runs twice."""

    def __init__(self, model: ir.Model, probe: Path, pieces: Sequence[Sequence[int]]) -> None:
        self._model, self._probe = model, probe
        self._values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        self._states = [_feeds(model.graph.inputs, batch) for batch in _batches(pieces)]
        self._tokens = sum(map(len, pieces))

    def sums(self, names: Sequence[str], later: Collection[str]) -> Hessians:
        """{name of a value: mean of x xᵀ over its rows x}. later: names of the values that later calls ask for."""
        known = set(self._states[0])
        run = [name for name in names if name not in known]
        kept = self._still_needed(known, run, later)
        session = self._session(known, list(dict.fromkeys([*run, *kept])))
        sums: Hessians = {}
        for index, state in enumerate(self._states):
            values = {**state, **self._computed(session, state)}
            for name in names:
                rows = np.asarray(values[name], np.float32).reshape(-1, values[name].shape[-1])
                if name not in sums:
                    sums[name] = np.zeros((rows.shape[1],) * 2, np.float32)
                sums[name] += rows.T @ rows
            self._states[index] = {name: values[name] for name in kept}
            del values, rows  # before the next window's are computed
        return {name: total / np.float32(self._tokens) for name, total in sums.items()}

    def _still_needed(self, known: set[str], run: Sequence[str], later: Collection[str]) -> list[str]:
        """Names of the values, known or computed now, that the values of `later` are computed from."""
        now = _nodes_behind(self._values, run, known)
        outputs = {str(value.name) for node in now for value in node.outputs}
        after = _nodes_behind(self._values, later, known | outputs)
        read = {str(value.name) for node in after for value in _read_by(node)} | set(later)
        return sorted(name for name in read if name in known or name in outputs)

    def _session(self, known: set[str], outputs: Sequence[str]) -> Any:
        computed = [name for name in outputs if name not in known]
        if not computed:
            return None
        for name in known:
            self._values[name].dtype = ir.DataType.from_numpy(self._states[0][name].dtype)
            self._values[name].shape = ir.Shape([None] * self._states[0][name].ndim)
        part = ir.convenience.extract(self._model.graph, sorted(known), computed)
        model = ir.Model(part, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        try:
            ir.save(model, self._probe)
            with mapped_errors("the inputs of the matrices cannot be computed", "export the model with another method"):
                return load_onnxruntime().InferenceSession(self._probe, providers=["CPUExecutionProvider"])
        finally:
            self._probe.unlink(missing_ok=True)

    def _computed(self, session: Any, state: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if session is None:
            return {}
        feeds = {item.name: state[item.name] for item in session.get_inputs()}
        names = [item.name for item in session.get_outputs()]
        with mapped_errors("the inputs of the matrices cannot be computed", "export the model with another method"):
            return dict(zip(names, session.run(names, feeds), strict=True))


def _nodes_behind(values: Mapping[str, ir.Value], names: Collection[str], known: Collection[str]) -> list[ir.Node]:
    """The nodes that compute the named values from those that are known."""
    found: dict[ir.Node, None] = {}
    left = [values[name] for name in names if name not in known]
    while left:
        node = left.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            left += [value for value in _read_by(node) if value.name not in known]
    return list(found)


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node and the nodes inside it read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (value for value in inner.inputs if value is not None)


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
    sizes: dict[str, int] = {}
    for name, (inputs, values) in matrices.items():
        own = dict.fromkeys(values, 4 * inputs * inputs)
        if group and sum({**sizes, **own}.values()) > _GROUP_BYTES:
            yield group
            group, sizes = {}, {}
        group[name] = inputs, values
        sizes |= own
    if group:
        yield group


def _mean(parts: Sequence[NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    if not all(np.isfinite(part).all() for part in parts):
        raise VerificationError(
            f"the inputs of {name} are not all finite numbers on the calibrating text: the weights are damaged, or the "
            "model computes beyond the range of float32"
        )
    return parts[0] if len(parts) == 1 else np.asarray(sum(parts) / np.float32(len(parts)), np.float32)


def _batches(pieces: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int64]]:
    """Pieces of equal length as batches: few large products with the transposed rows take two thirds of the time of
    many small ones."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    for alike in by_length.values():
        for begin in range(0, len(alike), _BATCH):
            yield np.array(alike[begin : begin + _BATCH], np.int64)


def _feeds(inputs: Sequence[ir.Value], batch: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The graph's inputs for a batch (rows, tokens) with empty caches."""
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": batch,
        "attention_mask": np.ones_like(batch),
        "logits_to_keep": np.zeros(1, np.int64),
    }
    for item in inputs:
        if item.name not in feeds:
            sizes = [] if item.shape is None else list(item.shape)
            if len(sizes) != 4:
                raise RecipeError("gptq needs a model whose only states are keys and values: use rtn or hqq")
            feeds[str(item.name)] = np.zeros(
                (len(batch), *(size if isinstance(size, int) else 0 for size in sizes[1:])), np.float32
            )
    return {str(item.name): feeds[str(item.name)] for item in inputs}
