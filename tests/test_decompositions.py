"""Tracing without torch's second pass: when it is used, and that it gives the same graph."""

from __future__ import annotations

import contextlib
from typing import Any

import onnx_ir as ir
import pytest
from torch.export import ExportedProgram

from edgelm.export.passes import fusing_passes
from edgelm.export.tracing import attention

from .model_zoo import CONTEXT, tiny_model


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """Records the programs that torch decomposes itself."""
    programs = []
    decompose = ExportedProgram.run_decompositions

    def noted(program: ExportedProgram, *arguments: Any) -> ExportedProgram:
        programs.append(program)
        return decompose(program, *arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return programs


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "olmo2"])
def test_common_models_need_no_second_pass_and_give_the_same_graph(
    model_type: str, decomposed: list[ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    light = _nodes(tiny_model(model_type))
    assert not decomposed
    monkeypatch.setattr(attention, "light_decompositions", contextlib.nullcontext)
    assert light == _nodes(tiny_model(model_type))
    assert len(decomposed) == 1


def test_a_program_with_other_operators_takes_torchs_own_pass(decomposed: list[ExportedProgram]) -> None:
    attention.trace_model(tiny_model("mixtral"))
    assert len(decomposed) == 1


def test_torch_decomposes_as_before_afterwards() -> None:
    before = ExportedProgram.run_decompositions
    attention.trace_model(tiny_model("llama"))
    assert ExportedProgram.run_decompositions is before


def _nodes(model: Any) -> list[Any]:
    """The nodes of the fused graph with attributes and inputs: constants by value, other inputs by the node that
    computes them."""
    graph = attention.trace_model(model).graph
    ir.passes.PassManager(fusing_passes(CONTEXT))(graph)
    places: dict[ir.Value | None, Any] = {None: None}
    nodes = []
    for index, node in enumerate(graph.graph):
        inputs = [places.get(value) or _constant_or_name(value) for value in node.inputs]
        nodes.append((node.domain, node.op_type, inputs, sorted(map(str, node.attributes.values()))))
        places.update({value: (index, output) for output, value in enumerate(node.outputs)})
    return nodes


def _constant_or_name(value: ir.Value | None) -> Any:
    if value is None or value.const_value is None:
        return None if value is None else value.name
    return value.const_value.dtype, value.const_value.numpy().tolist()
