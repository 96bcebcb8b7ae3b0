"""Norms of queries and keys are fused into the call of attention; without a kernel no bit changes. Whole models with
them are exact under any cut, with kernels and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.attention_functions import NORMED
from edgelm.export.passes.call_attention import CallAttention
from edgelm.export.passes.functions import BIASED, EDGELM
from edgelm.export.passes.graph import ATTENTION, KEPT_ATTENTION
from edgelm.export.passes.norm_in_attention import NormInAttention
from edgelm.export.quantization.calibration import cache_ranges
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.in_place import OrtSession

from .model_zoo import CONTEXT, tiny_model
from .test_models import FLOAT, INT8, session_of
from .test_passes import ATTEND, Array, attention_feeds, attention_graph, compute, count, floats, one, unchanged

INPUTS = "float[batch,new,64] x, "
SPLIT = "xq, xk, v = Split<axis = 2>(x, widths)"
WEIGHTS: dict[str, Array] = {
    "widths": np.array([32, 16, 16]),
    "qn": floats(16),
    "kn": floats(16),
    "heads": np.array([0, 0, -1, 16]),
    "qflat": np.array([0, 0, 32]),
    "kflat": np.array([0, 0, 16]),
}
NORM = """
    {0}4 = Reshape(x{0}, heads) {0}n4 = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> ({0}4, {0}n)
    {0} = Reshape({0}n4, {0}flat)
"""
MOVED = """
    {0}4 = Reshape(x{0}, heads) {0}h = Transpose <perm = [0, 2, 1, 3]> ({0}4)
    {0}nh = SimplifiedLayerNormalization <axis = 3, epsilon = 0.001> ({0}h, {0}n)
    {0}n4 = Transpose <perm = [0, 2, 1, 3]> ({0}nh) {0} = Reshape({0}n4, {0}flat)
"""
ATTENDED = ATTEND.format(out="y", q="q", k="k", v="v")


def called(body: str, weights: dict[str, Array] | None = None) -> ir.Model:
    """A graph that calls attention."""
    model = attention_graph(body, {**WEIGHTS, **(weights or {})}, inputs=INPUTS)
    CallAttention()(model)
    assert one(model, ATTENTION).domain == EDGELM
    return model


@pytest.mark.parametrize("norms", [(NORM, NORM), (MOVED, MOVED), (NORM, MOVED)])
def test_norms_of_heads_go_into_attention(norms: tuple[str, str]) -> None:
    body = SPLIT + norms[0].format("q") + norms[1].format("k") + ATTENDED
    before, model = called(body), called(body)
    assert NormInAttention()(model).modified
    call = one(model, NORMED[ATTENTION])
    assert [value.name for value in call.inputs[:3] if value is not None] == ["x", "qn", "kn"]
    assert call.attributes.get_float("epsilon", 0) == pytest.approx(0.001)
    assert not any(count(model, kind) for kind in ("Split", "Reshape", "Transpose", "SimplifiedLayerNormalization"))
    assert [function.name for function in model.functions.values()] == [NORMED[ATTENTION]]
    feeds = {**attention_feeds(), "x": floats(1, 5, 64)}
    for got, expected in zip(compute(model, feeds), compute(before, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert unchanged(NormInAttention(), model)


Q, K = NORM.format("q"), NORM.format("k")
NOT_NORMED = {
    "a query alone": f"{SPLIT} {Q} k = Identity(xk) {ATTENDED}",
    "a key alone": f"{SPLIT} {K} q = Identity(xq) {ATTENDED}",
    "another epsilon": f"{SPLIT} {Q} {K.replace('0.001', '0.01')} {ATTENDED}",
    "a value that is changed": f"{SPLIT.replace('v =', 'xv =')} v = Abs(xv) {Q} {K} {ATTENDED}",
    "another order": f"{SPLIT.replace('xk, v', 'v, xk')} {Q} {K} {ATTENDED}",
    "all heads together": f"{SPLIT} {K} q = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (xq, wide) "
    f"{ATTENDED}",
    "weights that are computed": f"{SPLIT} e = Exp(qn) {Q.replace(', qn)', ', e)')} {K} {ATTENDED}",
    "heads moved on one side": f"{SPLIT} {MOVED.format('q').replace('q4 = R', 'q5 = R').replace('(q4)', '(q5)')} {K} "
    f"{ATTENDED}".replace("qn4 = Transpose <perm = [0, 2, 1, 3]> (qnh)", "qn4 = Transpose <perm = [0, 1, 2, 3]> (qnh)"),
    "heads of another size": f"{SPLIT} {Q.replace('heads', 'small').replace(', qn)', ', short)')} "
    f"{K.replace('heads', 'small').replace(', kn)', ', short)')} {ATTENDED}",
}


@pytest.mark.parametrize("case", NOT_NORMED)
def test_other_norms_stay(case: str) -> None:
    more = {"wide": floats(32), "small": np.array([0, 0, -1, 8]), "short": floats(8)}
    assert unchanged(NormInAttention(), called(NOT_NORMED[case], more))


# Whole models: the operators between their products and attentions, and their bits under any cut

AROUND = 24
FUSED = {
    "gemma3_text": {"PostNormedRowwiseMatMul", "GeluGatedRowwiseMatMul", *NORMED.values()},
    "qwen3": {"NormedRowwiseMatMul", "GatedRowwiseMatMul", *NORMED.values()},
    "qwen2": {"BiasedNormedRowwiseMatMul", "NormedRowwiseMatMul", "GatedRowwiseMatMul", ATTENTION, KEPT_ATTENTION},
    "gemma2": {"PostNormedRowwiseMatMul", "GeluGatedRowwiseMatMul"},
}


@pytest.mark.parametrize("model_type", FUSED)
def test_current_models_have_the_same_bits_under_any_cut(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = trace_model(tiny_model(model_type))
    ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
    tokens = np.random.default_rng(1).integers(0, 256, 70).tolist()
    floating = session_of(traced, tmp_path / "fp32.onnx", FLOAT)
    assert isinstance(floating, OrtSession)
    ranges = cache_ranges(floating, [tokens])
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, ranges))(traced.graph)
    names = {node.op_type for node in traced.graph.graph if node.domain == EDGELM}
    assert names >= FUSED[model_type]
    assert sum(node.domain != EDGELM for node in traced.graph.graph) <= AROUND
    found = []
    for switch in ("off", "on"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        opened = session_of(traced, tmp_path / f"{switch}.onnx", INT8)
        whole = opened.step(tokens, len(tokens)).copy()
        opened.rewind(0)
        pieces = [opened.step(tokens[a:b], b - a).copy() for a, b in ((0, 33), (33, 34), (34, 35), (35, 70))]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        found.append(whole)
    assert np.sqrt(np.mean((found[0] - found[1]) ** 2)) <= 0.05 * np.sqrt(np.mean(found[0] ** 2))


def test_no_separate_bias_operators_remain_in_layers() -> None:
    """Otherwise kernels would not use their own threads in a Qwen 2 of 24 layers."""
    traced = trace_model(tiny_model("qwen2"))
    ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, {}))(traced.graph)
    assert not any(node.op_type == "Add" for node in traced.graph.graph)
    assert sum(node.op_type.startswith(BIASED) for node in traced.graph.graph) == len(traced.layers)
