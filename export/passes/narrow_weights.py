"""Store chosen int8 matrices with 4 to 6 bits: calls of other functions of the domain `edgelm`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..codes.nibbles import Nibbles, load_nibbles
from .functions import BIASED, EDGELM, PRODUCTS, ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, define
from .graph import Builder, GraphPass, add_weight, lazy_weight, producer, replace_value
from .narrow_functions import EMBEDDING, NARROW

_SUFFIXES = (".rows.int8", ".int8")


class NarrowWeights(GraphPass):
    """`edgelm.export.codes.nibbles` has the arithmetic: the int8 values of such a matrix are small multiples of
    its blocks' steps. Cases, for each named matrix, whose initializer is `NAME.int8`, or `NAME.rows.int8` if it is an
    embedding's table too:

    1. a call of a row-wise product function that reads it -> the function with `Int4`, `Int5` or `Int6` in front of the
       product's name
    2. the embedding of tokens by its rows (`QuantizeEmbedding`) -> a call of `Int4Embedding` or its like

    Runs after all passes that know only int8 matrices, and before `WidenActivations`, which knows both.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: {name of a matrix in the source model: file of `save_nibbles`}."""
        self._files = files

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for name, path in self._files.items():
            for suffix in _SUFFIXES:
                matrix = model.graph.initializers.get(name + suffix)
                if matrix is not None:
                    _narrow(model, name, matrix, path)
                    modified = True
        return modified


def bytes_of_matrices(model: ir.Model) -> dict[str, int]:
    """{name of each int8 matrix of a graph: its bytes with those of its scales}."""
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        suffix = next((suffix for suffix in _SUFFIXES if (value.name or "").endswith(suffix)), None)
        if suffix is not None and value.dtype == ir.DataType.INT8 and value.const_value is not None:
            name = (value.name or "").removesuffix(suffix)
            found[name] = value.const_value.nbytes + 4 * _columns(model, name)
    return found


def _columns(model: ir.Model, name: str) -> int:
    scales = model.graph.initializers[f"{name}.scale"].const_value
    assert scales is not None, "scales are initializers"
    return scales.size


def _narrow(model: ir.Model, name: str, matrix: ir.Value, path: Path) -> None:
    nibbles = load_nibbles(path)
    groups, factors = nibbles.shapes()
    inputs = [
        lazy_weight(model, f"{name}.int{nibbles.bits}", lambda: load_nibbles(path).groups(), ir.DataType.UINT8, groups),
        lazy_weight(model, f"{name}.factors", lambda: load_nibbles(path).factors(), ir.DataType.UINT8, factors),
        add_weight(model, f"{name}.int{nibbles.bits}.scale", nibbles.scales),
    ]
    for use in list(matrix.uses()):
        if use.node.domain == EDGELM and use.node.op_type in PRODUCTS:
            _narrow_product(model, use.node, use.idx, inputs, nibbles)
        else:
            _narrow_embedding(model, use.node, inputs, nibbles)


def _narrow_product(model: ir.Model, node: ir.Node, index: int, inputs: list[ir.Value], nibbles: Nibbles) -> None:
    biased, product = (
        (BIASED, node.op_type.removeprefix(BIASED)) if node.op_type.startswith(BIASED) else ("", node.op_type)
    )
    name = biased + NARROW[nibbles.bits] + product.replace(ROWWISE_MATMUL_TRANSPOSED, ROWWISE_MATMUL)
    define(model, name)
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    made = Builder(model, node, f"{node.name}.narrow").node(
        name,
        [*node.inputs[:index], *inputs, *node.inputs[index + 2 :]],
        {**attributes, "depth": nibbles.shape[0]},
        domain=EDGELM,
        outputs=len(node.outputs),
        like=node.outputs[0],
    )
    for old, new in zip(node.outputs, made, strict=True):
        replace_value(old, new)


def _narrow_embedding(model: ir.Model, gather: ir.Node, inputs: list[ir.Value], nibbles: Nibbles) -> None:
    """gather: reads the table's rows, which are then cast and scaled."""
    (cast,) = (use.node for use in gather.outputs[0].uses())
    (scaled,) = (use.node for use in cast.outputs[0].uses())
    if gather.op_type != "Gather" or producer(scaled.inputs[0]) is not cast:
        raise ValueError(f"{gather.name} is no embedding")
    name = NARROW[nibbles.bits] + EMBEDDING
    define(model, name)
    op = Builder(model, gather, f"{gather.name}.narrow")
    y = op(name, gather.inputs[1], *inputs, domain=EDGELM, like=scaled.outputs[0], depth=nibbles.shape[0])
    replace_value(scaled.outputs[0], y)
