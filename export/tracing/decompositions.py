"""Skip torch's second pass over the traced program where possible.

torch.onnx.export traces a model and then decomposes the program, which traces all operators again. This takes twice the
time of the first trace, though nearly all operators can be translated to ONNX directly. Two rules decide:

1. `aten.to` becomes `prims.convert_element_type`, or its input where the type stays: the one operator of common models
   without a translation.
2. A program with only operators in `_TRANSLATED` is then finished. They do not write into tensors, so nothing must be
made functional, and they give the same ONNX nodes as after torch's pass. Any other program takes that pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

_CONVERSIONS = frozenset({"aten.to.device", "aten.to.dtype", "aten.type_as.default"})
# Assertions about types, which the exporter removes itself.
_TRANSLATED = frozenset(
    {
        "<built-in function getitem>",
        "aten._assert_tensor_metadata.default",
        "aten.add.Tensor",
        "aten.cat.default",
        "aten.cos.default",
        "aten.div.Tensor",
        "aten.embedding.default",
        "aten.gelu.default",
        "aten.layer_norm.default",
        "aten.linear.default",
        "aten.mean.dim",
        "aten.mul.Tensor",
        "aten.neg.default",
        "aten.pow.Tensor_Scalar",
        "aten.reshape.default",
        "aten.rsqrt.default",
        "aten.scalar_tensor.default",
        "aten.silu.default",
        "aten.sin.default",
        "aten.slice.Tensor",
        "aten.sub.Tensor",
        "aten.sum.dim_IntList",
        "aten.sym_size.int",
        "aten.tanh.default",
        "aten.transpose.int",
        "aten.unsqueeze.default",
        "aten.view.default",
        "onnx_symbolic._symbolic.default",
        "onnx_symbolic._symbolic_multi_out.default",
        "prims.convert_element_type.default",
    }
)


@contextlib.contextmanager
def light_decompositions() -> Iterator[None]:
    """Let torch.onnx.export decompose programs by the module's rules inside the block."""
    decompose = ExportedProgram.run_decompositions

    def run_decompositions(program: ExportedProgram, *table: Any, **options: Any) -> ExportedProgram:
        return program if _convert(program) else decompose(program, *table, **options)

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def _convert(program: ExportedProgram) -> bool:
    """Apply the first rule in place if the second one holds. Returns whether it does."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if not {str(node.target) for node in calls} <= _TRANSLATED | _CONVERSIONS:
        return False
    for node in calls:
        if str(node.target) in _CONVERSIONS:
            _convert_type(program.graph, node)
    program.graph_module.recompile()
    return True


def _convert_type(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    source, wanted = node.args[0], node.meta["val"].dtype
    assert isinstance(source, torch.fx.Node), "a tensor is converted"
    with graph.inserting_before(node):
        if source.meta["val"].dtype != wanted:
            source = graph.call_function(torch.ops.prims.convert_element_type.default, (source, wanted))
            source.meta.update(node.meta)
    node.replace_all_uses_with(source)
    graph.erase_node(node)
