"""Rounding to int8 with error compensation: products on a text are more exact than with plain rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgelm.export.codes.gptq import gptq_columns
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.quantize_linears import column_scales, quantize_columns
from edgelm.export.quantization.hessians import collect_hessians, each_group_of_hessians
from edgelm.export.quantization.rounding import round_matrices
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.folder import GRAPH_NAME
from edgelm.runtime.errors import VerificationError

from .conftest import TEXT, tiny_llama

INPUTS, OUTPUTS = 96, 40


def rows_and_matrix() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Correlated inputs, as a real layer's, some much larger than others."""
    draw = np.random.default_rng(3)
    rows = draw.standard_normal((400, 12)) @ draw.standard_normal((12, INPUTS))
    rows += 0.1 * draw.standard_normal(rows.shape)
    rows[:, :4] *= 30
    return rows.astype(np.float32), draw.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


@pytest.mark.parametrize("limit", [127, 63])
def test_products_with_the_texts_inputs_are_more_exact(limit: int) -> None:
    rows, matrix = rows_and_matrix()
    scales = column_scales(matrix, limit)
    found = gptq_columns(matrix, rows.T @ rows / np.float32(len(rows)), scales, limit)
    assert found.dtype == np.int8
    assert np.abs(found.astype(int)).max() <= limit
    errors = [
        float(np.square(rows @ (levels * scales - matrix)).mean())
        for levels in (found, quantize_columns(matrix, limit))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_with_uncorrelated_inputs_it_is_plain_rounding() -> None:
    _, matrix = rows_and_matrix()
    scales = column_scales(matrix, 127)
    found = gptq_columns(matrix, np.eye(INPUTS, dtype=np.float32), scales, 127)
    np.testing.assert_array_equal(found, quantize_columns(matrix, 127))


def test_an_input_that_is_always_zero_has_no_effect() -> None:
    rows, matrix = rows_and_matrix()
    rows[:, 7] = 0
    found = gptq_columns(matrix, rows.T @ rows, column_scales(matrix, 127), 127)
    np.testing.assert_array_equal(found[7], quantize_columns(matrix, 127)[7])


def test_columns_are_rounded_equally_for_any_slab_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, matrix = rows_and_matrix()
    hessian, scales = rows.T @ rows, column_scales(matrix, 127)
    whole = gptq_columns(matrix, hessian, scales, 127)
    monkeypatch.setattr("edgelm.export.codes.gptq._SLAB", 7)
    parts = gptq_columns(matrix, hessian, scales, 127)
    assert (whole != parts).mean() < 0.002  # the order of additions differs


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused fp32 graph of a tiny model with tied embeddings."""
    path = tmp_path_factory.mktemp("fp32") / GRAPH_NAME
    traced = trace_model(tiny_llama(tie_word_embeddings=True))
    ir.passes.PassManager(fusing_passes(512))(traced.graph)
    ir.save(traced.graph, path, external_data="model.onnx.data")
    return path


def test_each_matrix_of_a_graph_is_rounded_and_written(graph: Path, tmp_path: Path) -> None:
    ids = list(TEXT.encode())
    files = round_matrices(graph, [ids], 512, 127, tmp_path)
    assert set(files) == set(collect_hessians(graph, ids[:64], 512))
    quantized = ir.load(graph)
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, {}, rounded=files))(quantized)
    written = quantized.graph.initializers
    for name, path in files.items():
        value = written.get(f"{name}.int8")
        stored = written[f"{name}.rows.int8"].const_value.numpy().T if value is None else value.const_value.numpy()  # type: ignore[union-attr]
        np.testing.assert_array_equal(stored, np.load(path))


def test_windows_in_one_batch_are_independent(graph: Path) -> None:
    ids = list(TEXT.encode())
    texts = [ids[:96], ids[96:192], ids[192:230], ids[230:326]]  # three of equal length and a short one
    (together,) = each_group_of_hessians(graph, texts, 96)
    alone = [collect_hessians(graph, text, 96) for text in texts]
    for name, found in together.items():
        weighted = sum(len(text) * one[name] for text, one in zip(texts, alone, strict=True)) / 326
        np.testing.assert_allclose(found, weighted, rtol=1e-4, atol=1e-5)


def test_groups_go_on_where_the_one_before_ended(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix in a group of its own: the same moments, and no product runs twice."""
    ids = list(TEXT.encode())[:128]
    whole = collect_hessians(graph, ids, 512)
    products: list[int] = []
    save = ir.save

    def saved(model: ir.Model, path: Path) -> None:
        products.append(sum(node.op_type == "MatMul" for node in model.graph))
        save(model, path)

    monkeypatch.setattr("edgelm.export.quantization.hessians._GROUP_BYTES", 1)
    monkeypatch.setattr("edgelm.export.quantization.hessians.ir.save", saved)
    found = list(each_group_of_hessians(graph, [ids], 512))
    together = {name: moments for group in found for name, moments in group.items()}
    assert together.keys() == whole.keys()
    for name, moments in together.items():
        np.testing.assert_allclose(moments, whole[name], rtol=1e-3, atol=1e-4)
    assert sum(products) == len(whole) - 1  # the head's product is not needed
    assert len(found) == 2 * 4 + 1  # before attention, behind it, before and inside each MLP; the head


def test_infinite_inputs_are_refused(graph: Path, tmp_path: Path) -> None:
    model = ir.load(graph)
    (name,) = [name for name in model.graph.initializers if "layers.1.mlp.down_proj" in name]
    weight = model.graph.initializers[name].const_value
    assert weight is not None
    broken = weight.numpy().copy()
    broken[:] = np.inf
    model.graph.initializers[name].const_value = ir.tensor(broken)
    ir.save(model, tmp_path / GRAPH_NAME, external_data="model.onnx.data")
    with pytest.raises(VerificationError, match=r"the inputs of .* are not all finite numbers on the calibrating text"):
        round_matrices(tmp_path / GRAPH_NAME, [list(TEXT.encode())], 512, 127, tmp_path)
