"""Graph passes on small graphs: what each must change, what it must leave unchanged, and that results stay equal."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import pytest
from numpy.typing import NDArray

from edgelm.export import passes
from edgelm.export.codes.blocks import BLOCK_SCHEMES, BlockQuantizer
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.call_attention import CallAttention
from edgelm.export.passes.drop_reshapes import DropReshapes
from edgelm.export.passes.drop_zeros import DropZeros
from edgelm.export.passes.fold_constants import FoldConstants
from edgelm.export.passes.fuse_biases import FuseBiases
from edgelm.export.passes.fuse_into_products import FuseIntoProducts
from edgelm.export.passes.fuse_norms import FuseRMSNorm
from edgelm.export.passes.fuse_residual_norms import FuseResidualNorms
from edgelm.export.passes.graph import GraphPass
from edgelm.export.passes.keep_last_logits import KeepLastLogits
from edgelm.export.passes.keep_on_host import KeepOnHost
from edgelm.export.passes.keep_rows import KeepRows
from edgelm.export.passes.last_logits_only import LastLogitsOnly
from edgelm.export.passes.lower_positions import LowerPositions
from edgelm.export.passes.merge_linears import MergeLinears
from edgelm.export.passes.narrow_weights import NarrowWeights
from edgelm.export.passes.norm_in_attention import NormInAttention
from edgelm.export.passes.normalize_linears import NormalizeLinears
from edgelm.export.passes.pack_attention_inputs import PackAttentionInputs
from edgelm.export.passes.pick_tokens import PickTokens
from edgelm.export.passes.quantize_blocks import QuantizeBlocks
from edgelm.export.passes.quantize_cache import QuantizeCache
from edgelm.export.passes.quantize_embedding import QuantizeEmbedding
from edgelm.export.passes.quantize_linears import QuantizeLinears
from edgelm.export.passes.rotate_in_attention import RotateInAttention
from edgelm.export.passes.to_float16 import ToFloat16
from edgelm.export.passes.widen_activations import WidenActivations
from edgelm.runtime.host import machine
from edgelm.runtime.host.ort import load_onnxruntime

Array = NDArray[Any]

RANDOM = np.random.default_rng(7)
BATCH, NEW, HIDDEN = 2, 5, 32
CLOSE = 1e-5
ROWWISE_SCALE = np.float32(1 / 127)


def floats(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def graph(
    signature: str, body: str, weights: Mapping[str, Array] | None = None, domains: Sequence[str] = ()
) -> ir.Model:
    """A model from onnx's text form. Weights become initializers; all shapes are inferred.

    signature: as in "float[batch,new,32] x -> float[batch,new,8] y".
    """
    weights = {name: np.asarray(array) for name, array in (weights or {}).items()}
    kinds = {"float32": "float", "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8"}
    inputs, outputs = signature.split("->")
    declared = [
        f"{kinds[array.dtype.name]}[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items()
    ]
    imports = ", ".join(
        f'"{domain}" : {version}' for domain, version in [("", 20), *((domain, 1) for domain in domains)]
    )
    text = (
        f"<ir_version: 10, opset_import: [{imports}]> g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}"
    )
    model = ir.from_onnx_text(text)
    for name, array in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
        if node.op_type == "Positions":
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            node.outputs[0].shape = node.inputs[0].shape if node.inputs[0] is not None else None
    # onnx cannot infer shapes of onnxruntime's norms: they must be set before the shapes of later nodes are inferred.
    ir.passes.common.ShapeInferencePass()(model)
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization" and node.inputs[0] is not None:
            node.outputs[0].type, node.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape
            ir.passes.common.ShapeInferencePass()(model)
    return model


def compute(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs of a model in onnxruntime, with the runtime's options."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if machine.saturates_int8():
        options.add_session_config_entry("session.x64quantprecision", "1")
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def content(model: ir.Model) -> bytes:
    """The model as bytes, equal for equal models. Declared operator sets that no node uses have no effect and are left
    out."""
    proto = ir.to_proto(model)
    used = {node.domain for node in proto.graph.node}
    for entry in [entry for entry in proto.opset_import if entry.domain not in used]:
        proto.opset_import.remove(entry)
    return bytes(proto.SerializeToString(deterministic=True))


def kinds(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def count(model: ir.Model, kind: str) -> int:
    return kinds(model).count(kind)


def one(model: ir.Model, kind: str) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == kind]
    return node


def initializers(model: ir.Model, kind: ir.DataType) -> dict[str, Array]:
    values = model.graph.initializers.values()
    found = {value.name: value.const_value for value in values if value.const_value and value.dtype == kind}
    return {str(name): tensor.numpy() for name, tensor in found.items()}


def assert_close(got: Sequence[Array], expected: Sequence[Array], tolerance: float = CLOSE) -> None:
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(right).max())))


def applied(work: ir.passes.PassBase, model: ir.Model, feeds: Mapping[str, Array]) -> None:
    """Run a pass that must change the model but not its results, and find nothing more to do when run again."""
    names = [value.name for value in model.graph.outputs]
    before = compute(model, feeds)
    assert work(model).modified
    assert [value.name for value in model.graph.outputs] == names
    assert_close(compute(model, feeds), before)
    assert unchanged(work, model)


def unchanged(work: ir.passes.PassBase, model: ir.Model) -> bool:
    """Return whether the pass reports no change; checks that this is true."""
    before = content(model)
    modified = work(model).modified
    if not modified:
        assert content(model) == before, f"{type(work).__name__} changed the graph and reported no change"
    return not modified


# The contract.

PASSES = [
    FoldConstants(),
    DropZeros(),
    NormalizeLinears(),
    FuseRMSNorm(),
    FuseResidualNorms(),
    RotateInAttention(16),
    DropReshapes(),
    PackAttentionInputs(),
    LowerPositions(64),
    MergeLinears(),
    QuantizeLinears("int8-rowwise", 127),
    QuantizeLinears("int8-tensor", 127),
    QuantizeEmbedding(127),
    QuantizeBlocks(BlockQuantizer(BLOCK_SCHEMES["int4-weight"])),
    FuseIntoProducts(),
    FuseBiases(),
    KeepRows(),
    QuantizeCache({}),
    CallAttention(),
    NormInAttention(),
    NarrowWeights({"w": Path("w.safetensors")}),
    WidenActivations(["w"]),
    KeepOnHost(),
]
# These concern the inputs or the logits of every model, so no graph is left as it is.
FOR_EVERY_GRAPH = [KeepLastLogits(), LastLogitsOnly(), PickTokens(), ToFloat16()]


def all_passes() -> set[type]:
    """The classes of passes that the modules of `export/passes` define."""
    found = set()
    for module in pkgutil.iter_modules(passes.__path__, f"{passes.__name__}."):
        defined = vars(importlib.import_module(module.name)).values()
        classes = {kind for kind in defined if isinstance(kind, type) and issubclass(kind, ir.passes.PassBase)}
        found |= {kind for kind in classes - {GraphPass} if kind.__module__ == module.name}
    return found


def test_every_pass_is_in_one_of_the_two_lists() -> None:
    assert {type(work) for work in PASSES + FOR_EVERY_GRAPH} == all_passes()


@pytest.mark.parametrize("work", FOR_EVERY_GRAPH, ids=lambda work: type(work).__name__)
def test_these_change_or_refuse_a_graph_that_concerns_no_other(work: ir.passes.PassBase) -> None:
    model = graph("float[batch,new,32] x -> float[batch,new,32] y", "a = Abs(x) y = Sqrt(a)")
    try:
        modified = work(model).modified
    except ir.passes.InvariantError:
        return
    assert modified


@pytest.mark.parametrize("domains", [(), ("com.microsoft", "edgelm")])
@pytest.mark.parametrize("work", PASSES, ids=lambda work: type(work).__name__)
def test_a_graph_that_concerns_no_pass_is_left_as_it_is(work: ir.passes.PassBase, domains: tuple[str, ...]) -> None:
    model = graph("float[batch,new,32] x -> float[batch,new,32] y", "a = Abs(x) y = Sqrt(a)", domains=domains)
    assert unchanged(work, model)


# FoldConstants


def test_fold_1_functions_are_inlined() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[batch,4] x) => (float[batch,4] y) { a = local.twice(x) y = local.twice(a) }
        <opset_import: ["" : 20], domain: "local">
        twice (v) => (w) { w = Add(v, v) }
    """)
    x = floats(3, 4)
    assert FoldConstants()(model).modified
    assert kinds(model) == ["Add", "Add"]
    assert not model.functions
    assert_close(compute(model, {"x": x}), [4 * x])


def test_fold_2_vectors_are_computed_matrices_are_not() -> None:
    weights = {"w": floats(64), "one": np.ones(64, np.float32), "matrix": floats(64, 64)}
    body = (
        "scale = Add(w, one) normed = Mul(x, scale) turned = Transpose<perm=[1,0]>(matrix) y = MatMul(normed, turned)"
    )
    model = graph("float[batch,64] x -> float[batch,64] y", body, weights)
    applied(FoldConstants(), model, {"x": floats(3, 64)})
    assert kinds(model) == ["MatMul", "Mul", "Transpose"]
    assert "matrix" in model.graph.initializers
    assert sum(array.size for array in initializers(model, ir.DataType.FLOAT).values()) == 64 * 64 + 64


def test_fold_3_common_subexpressions_are_shared_and_4_unused_nodes_go() -> None:
    body = "a = Exp(x) b = Exp(x) c = Sin(x) d = Cos(c) y = Add(a, b)"
    model = graph("float[batch,4] x -> float[batch,4] y", body)
    applied(FoldConstants(), model, {"x": floats(3, 4)})
    assert kinds(model) == ["Add", "Exp"]


def test_fold_ensures_that_no_function_is_left() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[batch,4] x) => (float[batch,4] y) { y = local.same(x) }
        <opset_import: ["" : 20], domain: "local">
        same (v) => (w) { w = Identity(v) }
    """)
    with pytest.raises(ir.passes.PostconditionError, match="functions are left"):
        FoldConstants().ensures(model)


# FuseRMSNorm

NORM = "float[batch,new,32] x -> float[batch,new,32] y"
SQUARES = {"power": "s = Pow(x, two)", "product": "s = Mul(x, x)"}
ENDINGS = {
    "reciprocal": "i = Reciprocal(r) n = Mul(x, i)",
    "reciprocal first": "i = Reciprocal(r) n = Mul(i, x)",
    "division": "n = Div(x, r)",
}


def norm_weights() -> dict[str, Array]:
    return {
        "two": np.array(2, np.float32),
        "axes": np.array([-1]),
        "e": np.array(1e-3, np.float32),
        "w": floats(HIDDEN),
    }


def norm_graph(
    *,
    square: str = SQUARES["power"],
    mean: str = "m = ReduceMean<keepdims=1>(s, axes)",
    root: str = "t = Add(m, e) r = Sqrt(t)",
    ending: str = ENDINGS["reciprocal"],
    scale: str = "y = Mul(w, n)",
    signature: str = NORM,
    **weights: Array,
) -> ir.Model:
    return graph(signature, " ".join([square, mean, root, ending, scale]), {**norm_weights(), **weights})


def norm_feeds() -> dict[str, Array]:
    # Some rows are so small that the epsilon matters.
    return {"x": floats(BATCH, NEW, HIDDEN) * np.array([1, 0.01, 10, 0.1, 0], np.float32)[:, None]}


@pytest.mark.parametrize("scale", ["y = Mul(w, n)", "y = Mul(n, w)"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES.keys())
def test_norm_every_spelling_is_fused(square: str, ending: str, scale: str) -> None:
    model = norm_graph(square=square, ending=ending, scale=scale)
    applied(FuseRMSNorm(), model, norm_feeds())
    assert kinds(model) == ["SimplifiedLayerNormalization"]
    assert one(model, "SimplifiedLayerNormalization").attributes.get_float("epsilon") == pytest.approx(1e-3)


def test_norm_over_a_positive_last_axis_and_the_epsilon_first() -> None:
    model = norm_graph(root="t = Add(e, m) r = Sqrt(t)", axes=np.array([2]))
    applied(FuseRMSNorm(), model, norm_feeds())
    assert kinds(model) == ["SimplifiedLayerNormalization"]


def test_norm_of_rank_4_over_heads() -> None:
    model = norm_graph(signature="float[batch,4,new,32] x -> float[batch,4,new,32] y")
    applied(FuseRMSNorm(), model, {"x": floats(BATCH, 4, NEW, HIDDEN)})
    assert kinds(model) == ["SimplifiedLayerNormalization"]


def test_norm_with_a_weight_that_is_computed() -> None:
    model = norm_graph(scale="w1 = Add(w, e) y = Mul(n, w1)")
    applied(FuseRMSNorm(), model, norm_feeds())
    assert kinds(model) == ["Add", "SimplifiedLayerNormalization"]


def test_norm_every_one_of_several_is_fused() -> None:
    body = """
        s = Pow(x, two) m = ReduceMean<keepdims=1>(s, axes) t = Add(m, e) r = Sqrt(t) i = Reciprocal(r) n = Mul(x, i)
        z = Mul(w, n)
        s2 = Pow(z, two) m2 = ReduceMean<keepdims=1>(s2, axes) t2 = Add(m2, e) r2 = Sqrt(t2) n2 = Div(z, r2)
        y = Mul(n2, w)
    """
    model = graph(NORM, body, norm_weights())
    applied(FuseRMSNorm(), model, norm_feeds())
    assert kinds(model) == ["SimplifiedLayerNormalization"] * 2


# Must not be fused: the parts of `norm_graph` that differ from a norm.
NO_NORMS: dict[str, dict[str, Any]] = {
    "wrong axis": {"axes": np.array([1])},
    "two axes": {"axes": np.array([1, 2])},
    "weight of rank 2": {"w": floats(NEW, HIDDEN)},
    "weight of one number": {"w": floats(1)},
    "weight of rank 0": {"w": np.array(3, np.float32)},
    "third power": {"two": np.array(3, np.float32)},
    "product of two values": {"square": "o = Abs(x) s = Mul(x, o)"},
    "epsilon for each channel": {"e": np.abs(floats(HIDDEN))},
    "cube root in place of the root": {"root": "t = Add(m, e) third = Mul(t, e) r = Sqrt(third)"},
    "another value is divided": {"ending": "o = Abs(x) n = Div(o, r)"},
    "the root is divided by the value": {"ending": "n = Div(r, x)"},
    "another sum in place of the product": {"scale": "y = Add(w, n)"},
}


@pytest.mark.parametrize("changes", NO_NORMS.values(), ids=NO_NORMS.keys())
def test_norm_lookalikes_are_left(changes: dict[str, Any]) -> None:
    model = norm_graph(**changes)
    compute(model, norm_feeds())  # the graph is valid
    assert unchanged(FuseRMSNorm(), model)


def test_norm_without_kept_dimensions_is_left() -> None:
    """The mean of row i would scale column i."""
    weights = {"w": floats(4)}
    model = norm_graph(mean="m = ReduceMean<keepdims=0>(s, axes)", signature="float[4,4] x -> float[4,4] y", **weights)
    before = compute(model, {"x": floats(4, 4)})
    assert before[0].shape == (4, 4)
    assert unchanged(FuseRMSNorm(), model)


@pytest.mark.parametrize("inner", ["m", "t", "r", "i", "n"])
def test_norm_with_an_inner_value_that_others_read_is_left(inner: str) -> None:
    output = "float[batch,new,1] also" if inner != "n" else "float[batch,new,32] also"
    model = norm_graph(scale=f"y = Mul(w, n) also = Abs({inner})", signature=f"{NORM}, {output}")
    assert unchanged(FuseRMSNorm(), model)


def test_norm_with_an_inner_value_as_output_is_left() -> None:
    model = norm_graph(signature=f"{NORM}, float[batch,new,32] n")
    assert unchanged(FuseRMSNorm(), model)


# FuseResidualNorms

SUM = "float[batch,new,32] a, float[batch,new,32] b -> float[batch,new,32] y"
RMS = "SimplifiedLayerNormalization<axis=-1, epsilon=0.001, stash_type=1>"
FULL = "LayerNormalization<axis=-1, epsilon=0.001>"


def sum_weights() -> dict[str, Array]:
    return {"w": floats(HIDDEN), "v": floats(HIDDEN)}


def sum_feeds() -> dict[str, Array]:
    return {"a": floats(BATCH, NEW, HIDDEN), "b": floats(BATCH, NEW, HIDDEN)}


@pytest.mark.parametrize(
    ("norm", "fused"),
    [(f"{RMS}(t, w)", "SkipSimplifiedLayerNormalization"), (f"{FULL}(t, w, v)", "SkipLayerNormalization")],
)
def test_residual_sum_and_norm_are_fused(norm: str, fused: str) -> None:
    model = graph(SUM, f"t = Add(a, b) y = {norm}", sum_weights())
    applied(FuseResidualNorms(), model, sum_feeds())
    assert kinds(model) == [fused]
    assert model.graph.opset_imports["com.microsoft"] == 1


def test_residual_sum_stays_available_to_others() -> None:
    body = f"t = Add(a, b) n = {RMS}(t, w) c = Exp(n) u = Add(t, c) y = {RMS}(u, v)"
    model = graph(f"{SUM}, float[batch,new,32] t", body, sum_weights())
    applied(FuseResidualNorms(), model, sum_feeds())
    assert count(model, "SkipSimplifiedLayerNormalization") == 2
    assert not count(model, "Add")


def test_residual_sum_of_several_norms_is_fused_with_the_first() -> None:
    body = f"t = Add(a, b) n = {RMS}(t, w) m = {RMS}(t, v) y = Mul(n, m)"
    model = graph(SUM, body, sum_weights())
    applied(FuseResidualNorms(), model, sum_feeds())
    assert kinds(model) == ["Mul", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"]


def test_residual_chain_of_layers_keeps_its_results() -> None:
    layer = "t{0} = Add({1}, c{0}) n{0} = {2}(t{0}, w) c{3} = Tanh(n{0})"
    steps = ["c0 = Tanh(b)", *(layer.format(i, "a" if i == 0 else f"t{i - 1}", RMS, i + 1) for i in range(4))]
    model = graph(SUM, " ".join([*steps, "y = Mul(t3, c4)"]), sum_weights())
    applied(FuseResidualNorms(), model, sum_feeds())
    assert count(model, "SkipSimplifiedLayerNormalization") == 4
    assert not count(model, "Add")


NO_RESIDUALS = {
    "broadcast over the rows": ("float[batch,new,32] a, float[32] b -> float[batch,new,32] y", f"y = {RMS}(t, w)"),
    "broadcast over the batch": (
        "float[batch,new,32] a, float[1,new,32] b -> float[batch,new,32] y",
        f"y = {RMS}(t, w)",
    ),
    "unlike sizes": ("float[batch,new,32] a, float[batch,one,32] b -> float[batch,new,32] y", f"y = {RMS}(t, w)"),
    "rank 2": ("float[new,32] a, float[new,32] b -> float[new,32] y", f"y = {RMS}(t, w)"),
    "rank 4": ("float[batch,2,new,32] a, float[batch,2,new,32] b -> float[batch,2,new,32] y", f"y = {RMS}(t, w)"),
    "another axis": (SUM, "y = LayerNormalization<axis=1>(t, k, k)"),
    "a weight that is computed": (SUM, f"u = Exp(w) y = {RMS}(t, u)"),
    "a mean that is read": (f"{SUM}, float[batch,new,1] z", f"y, mean = {FULL}(t, w, v) z = Exp(mean)"),
    "a mean that is an output": (f"{SUM}, float[batch,new,1] mean", f"y, mean = {FULL}(t, w, v)"),
    "a difference": (SUM, f"d = Sub(a, b) y = {RMS}(d, w)"),
}


@pytest.mark.parametrize(("signature", "body"), NO_RESIDUALS.values(), ids=NO_RESIDUALS.keys())
def test_residual_sums_of_other_forms_are_left(signature: str, body: str) -> None:
    model = graph(signature, f"t = Add(a, b) {body}", {**sum_weights(), "k": floats(NEW, HIDDEN)})
    assert unchanged(FuseResidualNorms(), model)


def test_residual_sum_of_unknown_shapes_is_left() -> None:
    """Two unknown dimensions may differ, so the sum may broadcast."""
    model = graph(SUM, f"t = Add(a, b) y = {RMS}(t, w)", sum_weights())
    for value in model.graph.inputs:
        value.shape = ir.Shape([None, None, HIDDEN])
    assert unchanged(FuseResidualNorms(), model)


# DropReshapes


def test_reshapes_that_cancel_are_removed() -> None:
    body = "f = Abs(x) h = Reshape(f, heads) back = Reshape(h, flat) y = Sqrt(back)"
    weights = {"heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])}
    model = graph(NORM, body, weights)
    applied(DropReshapes(), model, norm_feeds())
    assert kinds(model) == ["Abs", "Sqrt"]
    assert not model.graph.initializers


def test_reshapes_are_removed_over_a_longer_chain_too() -> None:
    body = "f = Abs(x) h = Reshape(f, heads) p = Reshape(h, pairs) back = Reshape(p, flat) y = Sqrt(back) z = Sqrt(p)"
    weights = {"heads": np.array([0, 0, 4, 8]), "pairs": np.array([0, 0, 16, 2]), "flat": np.array([0, 0, 32])}
    model = graph(f"{NORM}, float[batch,new,16,2] z", body, weights)
    applied(DropReshapes(), model, norm_feeds())
    assert kinds(model) == ["Abs", "Reshape", "Reshape", "Sqrt", "Sqrt"]


def test_a_reshape_that_changes_nothing_is_removed() -> None:
    model = graph(NORM, "f = Abs(x) y = Reshape(f, flat)", {"flat": np.array([0, 0, 32])})
    applied(DropReshapes(), model, norm_feeds())
    assert kinds(model) == ["Abs"]


@pytest.mark.parametrize(
    "body",
    [
        "f = Abs(x) y = Reshape(f, heads)",
        "f = Abs(x) h = Reshape(f, heads) t = Transpose<perm=[0,1,3,2]>(h) y = Reshape(t, flat)",
    ],
)
def test_reshapes_that_do_something_stay(body: str) -> None:
    weights = {"heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])}
    shape = "float[batch,new,32]" if "flat" in body else "float[batch,new,4,8]"
    model = graph(f"float[batch,new,32] x -> {shape} y", body, weights)
    assert unchanged(DropReshapes(), model)


def test_a_reshape_of_an_input_of_the_graph_stays() -> None:
    """A graph's output cannot be one of its inputs."""
    model = graph(NORM, "y = Reshape(x, flat)", {"flat": np.array([0, 0, 32])})
    assert unchanged(DropReshapes(), model)


def test_reshapes_between_unknown_shapes_stay() -> None:
    """Unknown dimensions look equal but may differ."""
    body = "f = Abs(x) y = Reshape(f, shape)"
    model = graph("float[p,q] x, int64[2] shape -> float[r,s] y", body)
    for value in (one(model, "Abs").outputs[0], one(model, "Reshape").outputs[0]):
        value.shape = ir.Shape([None, None])
    assert unchanged(DropReshapes(), model)


# Attention: a layer with a cache, as traced. heads 2, kv_heads 1.

CACHE = """
    int64[batch,total] attention_mask,
    float[batch,1,past,{0}] past_key_values.0.key, float[batch,1,past,{0}] past_key_values.0.value
"""
PRESENT = "float[batch,1,total,{0}] present.0.key, float[batch,1,total,{0}] present.0.value"
LENGTHS = """
    sums = ReduceSum<keepdims=0>(attention_mask, axis1) before = Sub(sums, one0) lengths = Cast<to=6>(before)
    sizes = Shape<start=1, end=2>(attention_mask) size0 = Squeeze(sizes) total0 = Cast<to=6>(size0)
"""
ATTEND = """
    {out}, present.0.key, present.0.value = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1, scale=0.3>(
        {q}, {k}, {v}, past_key_values.0.key, past_key_values.0.value, lengths, total0)
"""


def attention_graph(
    body: str, weights: Mapping[str, Array], size: int = 16, inputs: str = "", outputs: str = ""
) -> ir.Model:
    """A graph with one attention operator; the body names its query, key and value q, k and v."""
    signature = f"{inputs}{CACHE.format(size)} -> float[batch,new,{2 * size}] y{outputs}, {PRESENT.format(size)}"
    given = {"axis1": np.array([1]), "one0": np.array(1), **weights}
    # onnx's text form does not accept names with dots.
    for name in ("past_key_values", "present"):
        signature = re.sub(rf"{name}\.0\.(\w+)", rf"{name}_0_\1", signature)
        body = re.sub(rf"{name}\.0\.(\w+)", rf"{name}_0_\1", body)
    model = graph(signature, LENGTHS + body, given, ("com.microsoft", "edgelm"))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        found = re.fullmatch(r"(past_key_values|present)_0_(key|value)", value.name or "")
        if found is not None:
            value.name = f"{found[1]}.0.{found[2]}"
    return model


def attention_feeds(size: int = 16, past: int = 3) -> dict[str, Array]:
    """One row: onnxruntime takes no larger batch if a step adds several tokens to a cache."""
    return {
        "attention_mask": np.ones((1, past + NEW), np.int64),
        "past_key_values.0.key": floats(1, 1, past, size),
        "past_key_values.0.value": floats(1, 1, past, size),
    }


# PackAttentionInputs


def projections(size: int = 16) -> dict[str, Array]:
    return {
        "wq": floats(HIDDEN, 2 * size) / 4,
        "wk": floats(HIDDEN, size) / 4,
        "wv": floats(HIDDEN, size) / 4,
        "bq": floats(2 * size),
        "bk": floats(size),
        "bv": floats(size),
    }


X = "float[batch,new,32] x, "
PLAIN = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
BIASED = "q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(k0, bk) v0 = MatMul(x, wv) v = Add(v0, bv)"
PARTLY_BIASED = "q0 = MatMul(x, wq) q = Add(bq, q0) k = MatMul(x, wk) v0 = MatMul(x, wv) v = Add(v0, bv)"
TURNED = """
    tq = Transpose<perm=[1,0]>(uq) q = MatMul(x, tq) k = MatMul(x, wk)
    tv = Transpose<perm=[1,0]>(uv) v = MatMul(x, tv)
"""


@pytest.mark.parametrize("body", [PLAIN, BIASED, PARTLY_BIASED, TURNED], ids=["plain", "biased", "partly", "turned"])
def test_pack_three_linear_layers_become_one(body: str) -> None:
    weights = projections()
    weights |= {"uq": np.ascontiguousarray(weights["wq"].T), "uv": np.ascontiguousarray(weights["wv"].T)}
    model = attention_graph(body + ATTEND.format(out="y", q="q", k="k", v="v"), weights, inputs=X)
    applied(PackAttentionInputs(), model, {**attention_feeds(), "x": floats(1, NEW, HIDDEN)})
    assert count(model, "MatMul") == 1
    assert count(model, "Add") == (0 if body in (PLAIN, TURNED) else 1)
    assert not count(model, "Transpose")
    assert one(model, "GroupQueryAttention").inputs[1] is one(model, "GroupQueryAttention").inputs[2] is None


NO_PACKS = {
    "another input": "z = Abs(x) q = MatMul(x, wq) k = MatMul(z, wk) v = MatMul(x, wv)",
    "a key that is normed": f"q = MatMul(x, wq) k0 = MatMul(x, wk) k = {RMS}(k0, bk) v = MatMul(x, wv)",
    "a value that is scaled": "q = MatMul(x, wq) k = MatMul(x, wk) v0 = MatMul(x, wv) v = Mul(v0, bv)",
    "a factor that is computed": "q = MatMul(x, wq) u = Exp(wk) k = MatMul(x, u) v = MatMul(x, wv)",
}


@pytest.mark.parametrize("body", NO_PACKS.values(), ids=NO_PACKS.keys())
def test_pack_what_is_not_three_linear_layers_over_one_value_is_left(body: str) -> None:
    model = attention_graph(body + ATTEND.format(out="y", q="q", k="k", v="v"), projections(), inputs=X)
    compute(model, {**attention_feeds(), "x": floats(1, NEW, HIDDEN)})
    assert unchanged(PackAttentionInputs(), model)


def test_pack_keeps_a_projection_that_others_read() -> None:
    body = PLAIN + ATTEND.format(out="y", q="q", k="k", v="v") + "also = Exp(k)"
    model = attention_graph(body, projections(), inputs=X, outputs=", float[batch,new,16] also")
    applied(PackAttentionInputs(), model, {**attention_feeds(), "x": floats(1, NEW, HIDDEN)})
    assert one(model, "GroupQueryAttention").inputs[1] is None


# RotateInAttention

IDS = "int64[batch,new] input_ids, "
Q, K, V = ("float[batch,new,{0}] xq, ", "float[batch,new,{0}] xk, ", "float[batch,new,{0}] v, ")
POSITIONS = """
    places = edgelm.Positions(input_ids, attention_mask)
    placesf = Cast<to=1>(places) places3 = Unsqueeze(placesf, axis2)
    angles = Mul(places3, frequencies) both = Concat<axis=-1>(angles, angles)
    cos = Cos(both) sin = Sin(both) cos4 = Unsqueeze(cos, axis1) sin4 = Unsqueeze(sin, axis1)
"""
ROTATED = """
    {0}4 = Reshape(x{0}, {0}heads) {0}h = Transpose<perm=[0,2,1,3]>({0}4)
    {0}a = Mul({0}h, {1})
    {0}high = Slice({0}h, half, end, axis3) {0}low = Slice({0}h, zero, half, axis3)
    {0}negative = Neg({0}high) {0}turned = Concat<axis=-1>({0}negative, {0}low)
    {0}b = Mul({0}turned, {2})
    {0}sum = Add({0}a, {0}b) {0}t = Transpose<perm=[0,2,1,3]>({0}sum) {0} = Reshape({0}t, {0}flat)
"""


def rotary_weights(size: int) -> dict[str, Array]:
    return {
        "axis2": np.array([2]),
        "axis3": np.array([3]),
        "zero": np.array([0]),
        "half": np.array([size // 2]),
        "end": np.array([np.iinfo(np.int64).max]),
        "frequencies": (0.1 ** np.linspace(0, 2, size // 2)).astype(np.float32)[None, None],
        "qheads": np.array([0, 0, 2, size]),
        "kheads": np.array([0, 0, 1, size]),
        "qflat": np.array([0, 0, 2 * size]),
        "kflat": np.array([0, 0, size]),
    }


def rotary_graph(size: int = 16, *edits: tuple[str, str], extra: str = "", **weights: Array) -> ir.Model:
    """An attention with queries and keys rotated outside it; edits: (old, new) in the text of the graph."""
    body = POSITIONS + extra + ROTATED.format("q", "cos4", "sin4") + ROTATED.format("k", "cos4", "sin4")
    body += ATTEND.format(out="y", q="q", k="k", v="v")
    for old, new in edits:
        assert old in body
        body = body.replace(old, new)
    inputs = IDS + Q.format(2 * size) + K.format(size) + V.format(size)
    return attention_graph(body, {**rotary_weights(size), **weights}, size, inputs=inputs)


def rotary_feeds(size: int = 16) -> dict[str, Array]:
    return {
        **attention_feeds(size),
        "input_ids": np.zeros((1, NEW), np.int64),
        "xq": floats(1, NEW, 2 * size),
        "xk": floats(1, NEW, size),
        "v": floats(1, NEW, size),
    }


def rotated_pair(model: ir.Model, feeds: Mapping[str, Array]) -> None:
    """Move rotation into attention and compare with the original. onnxruntime needs lowered positions."""
    plain = model.clone()
    LowerPositions(64)(plain)
    before = compute(plain, feeds)
    assert RotateInAttention(64)(model).modified
    assert unchanged(RotateInAttention(64), model)
    LowerPositions(64)(model)
    assert_close(compute(model, feeds), before)


@pytest.mark.parametrize("size", [16, 32])
def test_rotation_moves_into_attention(size: int) -> None:
    model = rotary_graph(size)
    rotated_pair(model, rotary_feeds(size))
    attention = one(model, "GroupQueryAttention")
    assert attention.attributes.get_int("do_rotary") == 1
    assert [value.name for value in attention.inputs[:2] if value is not None] == ["xq", "xk"]
    for index in (7, 8):
        table = attention.inputs[index]
        # One row more than the context, because a padding row may follow the last token.
        assert table is not None
        assert list(table.shape or ()) == [65, size // 2]
    assert not {"Cos", "Sin", "Concat", "Neg"} & set(kinds(model))


def test_rotation_with_the_terms_the_other_way_round() -> None:
    edits = [("qsum = Add(qa, qb)", "qsum = Add(qb, qa)"), ("kb = Mul(kturned, sin4)", "kb = Mul(sin4, kturned)")]
    rotated_pair(rotary_graph(16, *edits, ("qa = Mul(qh, cos4)", "qa = Mul(cos4, qh)")), rotary_feeds())


def test_rotation_of_normed_heads() -> None:
    """The norm stays between the split into heads and the operator."""
    norm = f"qn = {RMS}(q4, headw) qh = Transpose<perm=[0,2,1,3]>(qn)"
    model = rotary_graph(16, ("qh = Transpose<perm=[0,2,1,3]>(q4)", norm), headw=floats(16))
    rotated_pair(model, rotary_feeds())
    assert count(model, "SimplifiedLayerNormalization") == 1


def test_rotation_with_scaled_cosines() -> None:
    """As in rope scalings that also change the attention's temperature."""
    cos = "cos_ = Cos(both) cos = Mul(cos_, factor)"
    model = rotary_graph(16, ("cos = Cos(both)", cos), factor=np.array(1.3, np.float32))
    rotated_pair(model, rotary_feeds())


def test_rotation_shares_its_tables_between_layers() -> None:
    second = """
        y2, pk, pv = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1, scale=0.3>(
            q, k, v, past_key_values.0.key, past_key_values.0.value, lengths, total0)
        y = Add(y1, y2)
    """
    edits = [("y, present.0.key", "y1, present.0.key")]
    body = rotary_body(*edits) + second
    model = attention_graph(body, rotary_weights(16), 16, inputs=IDS + Q.format(32) + K.format(16) + V.format(16))
    rotated_pair(model, rotary_feeds())
    first, other = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert first.inputs[7] is other.inputs[7]
    assert first.inputs[8] is other.inputs[8]


def rotary_body(*edits: tuple[str, str]) -> str:
    body = POSITIONS + ROTATED.format("q", "cos4", "sin4") + ROTATED.format("k", "cos4", "sin4")
    body += ATTEND.format(out="y", q="q", k="k", v="v")
    for old, new in edits:
        assert old in body
        body = body.replace(old, new)
    return body


OTHER_COS = (
    "others = Mul(angles, two) both2 = Concat<axis=-1>(others, others) cos2 = Cos(both2) cos5 = Unsqueeze(cos2, axis1)"
)
NO_ROTATIONS: dict[str, dict[str, Any]] = {
    "keys turn by other angles": {
        "edits": [("ka = Mul(kh, cos4)", "ka = Mul(kh, cos5)")],
        "extra": OTHER_COS,
        "two": np.array(2, np.float32),
    },
    "keys do not turn": {"edits": [("q, k, v, past", "q, xk, v, past")]},
    "queries do not turn": {"edits": [("q, k, v, past", "xq, k, v, past")]},
    "the halves have unlike angles": {
        "edits": [
            ("both = Concat<axis=-1>(angles, angles)", "more = Mul(angles, two) both = Concat<axis=-1>(angles, more)")
        ],
        "two": np.array(2, np.float32),
    },
    "turns the other way": {
        "edits": [
            ("qturned = Concat<axis=-1>(qnegative, qlow)", "ql = Neg(qlow) qturned = Concat<axis=-1>(qhigh, ql)"),
            ("kturned = Concat<axis=-1>(knegative, klow)", "kl = Neg(klow) kturned = Concat<axis=-1>(khigh, kl)"),
        ]
    },
    "the lower half is negated": {
        "edits": [("qnegative = Neg(qhigh)", "qnegative = Neg(qlow)"), ("(qnegative, qlow)", "(qnegative, qhigh)")]
    },
    "cuts beside the middle": {"edits": [], "half": np.array([4])},
    "a difference in place of the sum": {"edits": [("qsum = Add(qa, qb)", "qsum = Sub(qa, qb)")]},
    "angles depend on the tokens": {
        "edits": [("placesf = Cast<to=1>(places)", "moved = Add(places, input_ids) placesf = Cast<to=1>(moved)")]
    },
    "angles depend on the mask": {
        "edits": [("placesf = Cast<to=1>(places)", "moved = Add(places, sizes) placesf = Cast<to=1>(moved)")]
    },
    "angles do not depend on the positions": {
        "edits": [("placesf = Cast<to=1>(places)", "placesf = Cast<to=1>(input_ids)")]
    },
}


@pytest.mark.parametrize("changes", NO_ROTATIONS.values(), ids=NO_ROTATIONS.keys())
def test_rotation_of_other_forms_stays_outside(changes: dict[str, Any]) -> None:
    settings = dict(changes)
    edits = settings.pop("edits")
    model = rotary_graph(16, *edits, **settings)
    assert unchanged(RotateInAttention(64), model)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_rotation_of_other_sizes_than_multiples_of_16_stays_outside(size: int) -> None:
    assert unchanged(RotateInAttention(64), rotary_graph(size))


# LowerPositions


def test_positions_of_rows_of_different_lengths() -> None:
    signature = "int64[batch,new] input_ids, int64[batch,total] mask -> int64[batch,new] y"
    model = graph(signature, "p = edgelm.Positions(input_ids, mask) y = Identity(p)", domains=["edgelm"])
    with pytest.raises(ir.passes.PostconditionError, match="Positions"):
        LowerPositions(64).ensures(model)
    assert LowerPositions(64)(model).modified
    assert "edgelm" not in model.graph.opset_imports
    # Three rows of 7, 5 and 3 tokens, 3 of them new.
    mask = (np.arange(7) < np.array([[7], [5], [3]])).astype(np.int64)
    (got,) = compute(model, {"input_ids": np.zeros((3, 3), np.int64), "mask": mask})
    assert got.tolist() == [[4, 5, 6], [2, 3, 4], [0, 1, 2]]
    assert unchanged(LowerPositions(64), model)


def test_a_padding_row_after_a_full_context_has_the_last_position() -> None:
    signature = "int64[batch,new] input_ids, int64[batch,total] mask -> int64[batch,new] y"
    model = graph(signature, "p = edgelm.Positions(input_ids, mask) y = Identity(p)", domains=["edgelm"])
    assert LowerPositions(7)(model).modified
    (got,) = compute(model, {"input_ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 8), np.int64)})
    assert got.tolist() == [[6, 6]]


def test_positions_that_several_read_are_all_lowered() -> None:
    signature = "int64[batch,new] input_ids, int64[batch,total] mask -> int64[batch,new] y"
    body = "p = edgelm.Positions(input_ids, mask) o = edgelm.Positions(input_ids, mask) a = Add(p, p) y = Add(a, o)"
    model = graph(signature, body, domains=["edgelm"])
    assert LowerPositions(64)(model).modified
    (got,) = compute(model, {"input_ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 5), np.int64)})
    assert got.tolist() == [[9, 12]]


# MergeLinears

MLP = "float[batch,new,32] x -> float[batch,new,12] y"


def mlp_weights() -> dict[str, Array]:
    return {
        "a": floats(32, 12),
        "b": floats(32, 12),
        "c": floats(32, 7),
        "d": floats(12),
        "e": floats(7),
        "at": floats(12, 32),
    }


MERGES = {
    "gate and up": "g = MatMul(x, a) u = MatMul(x, b) s = Sigmoid(g) y = Mul(s, u)",
    "with biases": "g0 = MatMul(x, a) g = Add(g0, d) u = MatMul(x, b) s = Sigmoid(g) y = Mul(s, u)",
    "weights stored the other way": "t = Transpose<perm=[1,0]>(at) g = MatMul(x, t) u = MatMul(x, b) y = Sub(g, u)",
    "used several times": "g = MatMul(x, a) u = MatMul(x, b) s = Mul(g, u) r = Sub(s, u) y = Add(r, g)",
}


@pytest.mark.parametrize("body", MERGES.values(), ids=MERGES.keys())
def test_merge_linears_over_the_same_value(body: str) -> None:
    model = graph(MLP, body, mlp_weights())
    applied(MergeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert count(model, "MatMul") == count(model, "Split") == 1


def test_merge_three_of_unlike_widths_one_with_a_bias() -> None:
    body = "f = MatMul(x, a) g0 = MatMul(x, c) g = Add(e, g0) h = MatMul(x, b) p = Abs(f) q = Exp(g) r = Tanh(h)"
    signature = "float[batch,new,32] x -> float[batch,new,12] p, float[batch,new,7] q, float[batch,new,12] r"
    model = graph(signature, body, mlp_weights())
    applied(MergeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert count(model, "MatMul") == count(model, "Split") == 1


def test_merge_groups_by_the_value_that_is_read() -> None:
    body = """
        z = Tanh(x) f = MatMul(x, a) g = MatMul(z, a2) h = MatMul(x, b) i = MatMul(z, b2)
        fg = Mul(f, g) hi = Mul(h, i) y = Add(fg, hi)
    """
    model = graph(MLP, body, {**mlp_weights(), "a2": floats(32, 12), "b2": floats(32, 12)})
    applied(MergeLinears(), model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert count(model, "MatMul") == count(model, "Split") == 2


def test_merge_with_a_bias_of_one_number_keeps_the_results() -> None:
    body = "g0 = MatMul(x, a) g = Add(g0, shift) u = MatMul(x, b) s = Sigmoid(g) y = Mul(s, u)"
    model = graph(MLP, body, {**mlp_weights(), "shift": floats(1)})
    feeds = {"x": floats(BATCH, NEW, HIDDEN)}
    before = compute(model, feeds)
    MergeLinears()(model)
    assert_close(compute(model, feeds), before)


NO_MERGES = {
    "unlike inputs": "z = Tanh(x) g = MatMul(x, a) u = MatMul(z, b) y = Mul(g, u)",
    "one weight for both": "g = MatMul(x, a) u = MatMul(x, a) y = Mul(g, u)",
    "one turned weight for both": "t = Transpose<perm=[1,0]>(at) g = MatMul(x, t) u = MatMul(x, t) y = Mul(g, u)",
    "a weight that others read": """
        g = MatMul(x, a) o = ReduceSum<keepdims=0>(a, first) s = Add(g, o) u = MatMul(x, b) y = Mul(s, u)
    """,
    "a factor that is computed": "i = Exp(a) g = MatMul(x, i) u = MatMul(x, b) y = Mul(g, u)",
    "only one": "g = MatMul(x, a) y = Tanh(g)",
}


@pytest.mark.parametrize("body", NO_MERGES.values(), ids=NO_MERGES.keys())
def test_merge_leaves_shared_and_single_layers(body: str) -> None:
    model = graph(MLP, body, {**mlp_weights(), "first": np.array([0])})
    compute(model, {"x": floats(BATCH, NEW, HIDDEN)})
    assert unchanged(MergeLinears(), model)


def test_merge_leaves_a_layer_that_is_an_output_of_the_graph() -> None:
    model = graph(f"{MLP}, float[batch,new,12] g", "g = MatMul(x, a) u = MatMul(x, b) y = Mul(g, u)", mlp_weights())
    assert unchanged(MergeLinears(), model)


# KeepLastLogits

HEADS = {
    "plain": "logits = MatMul(x, w)",
    "turned": "t = Transpose<perm=[1,0]>(wt) logits = MatMul(x, t)",
    "bias": "l = MatMul(x, w) logits = Add(l, b)",
    "soft cap": "l = MatMul(x, w) d = Div(l, k) h = Tanh(d) logits = Mul(k, h)",
}


@pytest.mark.parametrize("body", HEADS.values(), ids=HEADS.keys())
def test_keep_gives_the_last_rows_or_all(body: str) -> None:
    weights = {"w": floats(32, 40), "wt": floats(40, 32), "b": floats(40), "k": np.array(5, np.float32)}
    model = graph("float[batch,new,32] x0 -> float[batch,new,40] logits", f"x = Tanh(x0) {body}", weights)
    x = floats(BATCH, NEW, HIDDEN)
    (everything,) = compute(model, {"x0": x})
    assert KeepLastLogits()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x0", "logits_to_keep"]
    for keep in (1, 2, NEW):
        assert_close(compute(model, {"x0": x, "logits_to_keep": np.array([keep])}), [everything[:, -keep:]])
    assert_close(compute(model, {"x0": x, "logits_to_keep": np.array([0])}), [everything])


def test_keep_leaves_other_outputs_whole() -> None:
    body = "h = Tanh(x0) logits = MatMul(h, w) other = Exp(h)"
    model = graph(
        "float[batch,new,32] x0 -> float[batch,new,40] logits, float[batch,new,32] other", body, {"w": floats(32, 40)}
    )
    KeepLastLogits()(model)
    logits, other = compute(model, {"x0": floats(BATCH, NEW, HIDDEN), "logits_to_keep": np.array([1])})
    assert logits.shape == (BATCH, 1, 40)
    assert other.shape == (BATCH, NEW, HIDDEN)


@pytest.mark.parametrize("body", ["logits = Tanh(x0)", "h = MatMul(x0, w) logits = Softmax<axis=1>(h)"])
def test_keep_raises_where_there_is_no_head(body: str) -> None:
    model = graph("float[batch,new,32] x0 -> float[batch,new,32] logits", body, {"w": floats(32, 32)})
    before = content(model)
    with pytest.raises(ir.passes.PostconditionError, match="logits"):
        KeepLastLogits()(model)
    assert content(model) == before


def test_keep_does_not_cut_one_of_two_terms_only() -> None:
    """With one row kept, the other term would broadcast without an error."""
    body = "f = MatMul(x0, w) g = MatMul(x0, v) logits = Add(f, g)"
    weights = {"w": floats(32, 40), "v": floats(32, 40)}
    model = graph("float[batch,new,32] x0 -> float[batch,new,40] logits", body, weights)
    x = floats(BATCH, NEW, HIDDEN)
    (everything,) = compute(model, {"x0": x})
    try:
        KeepLastLogits()(model)
    except ir.passes.PostconditionError:
        return
    assert_close(compute(model, {"x0": x, "logits_to_keep": np.array([1])}), [everything[:, -1:]])


# QuantizeLinears

LINEAR = "float[batch,new,32] x -> float[batch,new,12] y"


def quantized_columns(array: Array, limit: int) -> tuple[Array, Array]:
    """int8 weights and scales as the pass documents them."""
    largest = np.abs(array).max(axis=0)
    scales = np.where(largest > 0, largest / limit, 1).astype(np.float32)
    return np.rint(array / scales).astype(np.int8), scales


def rowwise_reference(x: Array, array: Array, limit: int = 127) -> Array:
    """x @ array by the arithmetic of `int8-rowwise`: each row is quantized in units of its largest magnitude."""
    weight, scales = quantized_columns(array, limit)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    units = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)
    codes = np.rint(units / ROWWISE_SCALE).astype(np.int32) + 128
    assert codes.min() >= 1
    assert codes.max() <= 255
    sums = (codes - 128) @ weight.astype(np.int32)
    return (sums.astype(np.float32) * (ROWWISE_SCALE * scales) * largest).astype(np.float32)


def tensor_reference(x: Array, array: Array, limit: int = 127) -> Array:
    """x @ array by ONNX's DynamicQuantizeLinear: one scale and zero point for all of x."""
    weight, scales = quantized_columns(array, limit)
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int32) - int(zero)
    return ((codes @ weight.astype(np.int32)).astype(np.float32) * (scale * scales)).astype(np.float32)


def rows_of_unlike_sizes() -> Array:
    x = floats(BATCH, NEW, HIDDEN)
    x[0, 1] = 0  # a row of zeros must not divide by zero
    x[0, 2] *= 1000
    x[1, 3] *= 1e-6
    return x


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("scheme", "reference"), [("int8-rowwise", rowwise_reference), ("int8-tensor", tensor_reference)]
)
def test_quantized_product_is_the_documented_arithmetic(scheme: str, reference: Any, turned: bool, limit: int) -> None:
    weight = floats(32, 12)
    weight[:, 4] = 0  # a column of zeros too
    weight[:, 5] *= 100
    if turned:
        body, weights = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)", {"w": np.ascontiguousarray(weight.T)}
    else:
        body, weights = "y = MatMul(x, w)", {"w": weight}
    model = graph(LINEAR, body, weights)
    assert QuantizeLinears(scheme, limit)(model).modified
    assert "MatMul" not in kinds(model)
    (matrix,) = initializers(model, ir.DataType.INT8).values()
    expected, scales = quantized_columns(weight, limit)
    assert np.array_equal(matrix, expected)
    assert np.abs(matrix.astype(int)).max() == limit
    assert np.array_equal(model.graph.initializers["w.scale"].const_value.numpy(), scales)  # type: ignore[union-attr]
    assert "w" not in model.graph.initializers
    x = rows_of_unlike_sizes()
    (got,) = compute(model, {"x": x})
    wanted = reference(x, weight, limit)
    assert np.isfinite(got).all()
    # Relative to each row: rows differ in magnitude by nine orders.
    assert (np.abs(got - wanted) <= 1e-5 * np.abs(wanted).max(axis=-1, keepdims=True)).all()
    assert unchanged(QuantizeLinears(scheme, limit), model)


def test_rowwise_a_row_of_zeros_gives_zeros() -> None:
    model = graph(LINEAR, "y = MatMul(x, w)", {"w": floats(32, 12)})
    QuantizeLinears("int8-rowwise", 127)(model)
    (got,) = compute(model, {"x": np.zeros((1, 2, HIDDEN), np.float32)})
    assert not got.any()


def test_rowwise_a_row_depends_on_no_other() -> None:
    model = graph(LINEAR, "y = MatMul(x, w)", {"w": floats(32, 12)})
    QuantizeLinears("int8-rowwise", 127)(model)
    x = rows_of_unlike_sizes()
    (together,) = compute(model, {"x": x})
    for row in range(BATCH):
        for token in range(NEW):
            (alone,) = compute(model, {"x": x[row : row + 1, token : token + 1]})
            assert np.array_equal(alone[0, 0], together[row, token])


def test_rowwise_is_close_to_the_product_itself() -> None:
    weight, x = floats(32, 12), floats(BATCH, NEW, HIDDEN)
    model = graph(LINEAR, "y = MatMul(x, w)", {"w": weight})
    QuantizeLinears("int8-rowwise", 127)(model)
    (got,) = compute(model, {"x": x})
    exact = x @ weight
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


def test_an_activation_of_several_products_is_quantized_once() -> None:
    """Row by row, onnxruntime does this (test_functions)."""
    model = graph(LINEAR, "f = MatMul(x, a) g = MatMul(x, b) y = Add(f, g)", {"a": floats(32, 12), "b": floats(32, 12)})
    QuantizeLinears("int8-tensor", 127)(model)
    assert count(model, "DynamicQuantizeLinear") == 1
    assert count(model, "MatMulIntegerToFloat") == 2


def test_a_weight_of_several_products_is_stored_once() -> None:
    weight, x = floats(32, 12), floats(BATCH, NEW, HIDDEN)
    model = graph(LINEAR, "z = Tanh(x) f = MatMul(x, w) g = MatMul(z, w) y = Add(f, g)", {"w": weight})
    QuantizeLinears("int8-rowwise", 127)(model)
    assert len(initializers(model, ir.DataType.INT8)) == 1
    (got,) = compute(model, {"x": x})
    expected = rowwise_reference(x, weight) + rowwise_reference(np.tanh(x), weight)
    assert np.abs(got - expected).max() <= 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["int8-rowwise", "int8-tensor"])
def test_matrices_in_bodies_of_other_nodes_are_quantized_too(scheme: str) -> None:
    body = """
        y = If (yes) <
            then_branch = first () => (float[batch,new,12] f) {
                [p] f1 = MatMul(x, a) [q] f2 = MatMul(x, b) f = Add(f1, f2)
            },
            else_branch = second () => (float[batch,new,12] g) {
                [r] g1 = MatMul(x, a) [s] g2 = MatMul(x, c) g = Sub(g1, g2)
            }
        >
    """
    weights = {name: floats(32, 12) for name in "abc"}
    model = graph(f"bool yes, {LINEAR}", body, weights)
    x = floats(BATCH, NEW, HIDDEN)
    feeds = [{"yes": np.array(yes), "x": x} for yes in (True, False)]
    before = [compute(model, feed)[0] for feed in feeds]
    for work in [MergeLinears(), *quantizing_passes(scheme, 8, {})]:
        work(model)
    assert not [node for node in model.graph.all_nodes() if node.op_type == "MatMul"]
    for feed, expected in zip(feeds, before, strict=True):
        assert np.abs(compute(model, feed)[0] - expected).max() <= 0.02 * np.abs(expected).max()


def test_matrices_that_are_excluded_or_computed_stay() -> None:
    body = """
        f = MatMul(x, kept) g = MatMul(x, w)
        t = Transpose<perm=[0,2,1]>(x) xx = MatMul(x, t) h = MatMul(xx, g) y = Add(f, h)
    """
    model = graph(LINEAR, body, {"kept": floats(32, 12), "w": floats(32, 12)})
    assert QuantizeLinears("int8-rowwise", 127, excluded=["kept"])(model).modified
    assert count(model, "MatMul") == 3
    assert count(model, "RowwiseMatMul") == 1
    assert list(initializers(model, ir.DataType.INT8)) == ["w.int8"]
    compute(model, {"x": floats(BATCH, NEW, HIDDEN)})


def test_only_excluded_matrices_leave_the_graph_as_it_is() -> None:
    model = graph(LINEAR, "y = MatMul(x, w)", {"w": floats(32, 12)})
    assert unchanged(QuantizeLinears("int8-rowwise", 127, excluded=["w"]), model)


def test_a_linear_layer_that_is_written_as_a_gemm_is_quantized_too() -> None:
    """GPT-2 has such layers. Runs all passes, because any of them may turn it into a MatMul."""
    body = """
        rows = Reshape(x, two) g = Gemm(rows, w, b) t = Gemm<transB=1>(g, turned) h = Reshape(t, three)
        logits = MatMul(h, head)
    """
    weights = {"w": floats(32, 48), "b": floats(48), "turned": floats(12, 48), "head": floats(12, 40)}
    shapes = {"two": np.array([-1, 32]), "three": np.array([BATCH, NEW, 12])}
    model = graph("float[batch,new,32] x -> float[batch,new,40] logits", body, {**weights, **shapes})
    x = floats(BATCH, NEW, HIDDEN)
    (exact,) = compute(model, {"x": x})
    for work in [*fusing_passes(16), *quantizing_passes("int8-rowwise", 8, {})]:
        work(model)
    assert count(model, "RowwiseMatMul") + count(model, "BiasedRowwiseMatMul") == 3
    assert len(initializers(model, ir.DataType.INT8)) == 3
    (got,) = compute(model, {"x": x, "logits_to_keep": np.array([0])})
    assert np.abs(got - exact).max() <= 0.05 * np.abs(exact).max()


def test_an_unknown_scheme_is_no_pass() -> None:
    with pytest.raises(KeyError):
        QuantizeLinears("int4", 7)


# QuantizeEmbedding

TOKENS = "int64[batch,new] input_ids -> float[batch,new,40] y"
TIED = "e = Gather(table, input_ids) h = Tanh(e) t = Transpose<perm=[1,0]>(table) y = MatMul(h, t)"
UNTIED = "e = Gather(table, input_ids) h = Tanh(e) y = MatMul(h, head)"


def embedding_reference(table: Array, ids: Array, limit: int = 127) -> Array:
    codes, scales = quantized_columns(table.T, limit)
    return (codes.T[ids].astype(np.float32) * scales[ids][..., None]).astype(np.float32)


@pytest.mark.parametrize("limit", [127, 63])
def test_embedding_1_shares_one_matrix_with_a_tied_head(limit: int) -> None:
    table = floats(40, 32)
    table[7] = 0
    model = graph(TOKENS.replace("y", "y, float[batch,new,32] e"), TIED, {"table": table})
    QuantizeLinears("int8-rowwise", limit)(model)
    assert QuantizeEmbedding(limit)(model).modified
    stored = initializers(model, ir.DataType.INT8)
    assert [array.shape for array in stored.values()] == [(40, 32)]
    assert [node.attributes.get_int("axis", 0) for node in model.graph if node.op_type == "Gather"] == [0, 0]
    assert "table" not in model.graph.initializers
    assert not [array for array in initializers(model, ir.DataType.FLOAT).values() if array.ndim == 2]
    ids = RANDOM.integers(0, 40, (BATCH, NEW))
    ids[0, 0] = 7
    logits, embedded = compute(model, {"input_ids": ids})
    expected = embedding_reference(table, ids, limit)
    assert np.array_equal(embedded, expected)
    wanted = rowwise_reference(np.tanh(expected), table.T, limit)
    # tanh differs in the last bit, which may change a rounding by one step.
    assert np.abs(logits - wanted).max() <= 0.01 * np.abs(wanted).max()
    assert unchanged(QuantizeEmbedding(limit), model)


def test_embedding_2_of_an_untied_head_is_quantized_by_row() -> None:
    table, head = floats(40, 32), floats(32, 40)
    model = graph(TOKENS.replace("y", "y, float[batch,new,32] e"), UNTIED, {"table": table, "head": head})
    QuantizeLinears("int8-rowwise", 127)(model)
    assert QuantizeEmbedding(127)(model).modified
    shapes = {name: array.shape for name, array in initializers(model, ir.DataType.INT8).items()}
    assert shapes == {"table.rows.int8": (40, 32), "head.int8": (32, 40)}
    ids = RANDOM.integers(0, 40, (BATCH, NEW))
    _, embedded = compute(model, {"input_ids": ids})
    assert np.array_equal(embedded, embedding_reference(table, ids))


def test_embedding_of_a_tied_head_that_is_excluded() -> None:
    """The head keeps the fp32 table; the embedding gets an int8 one of its own."""
    table = floats(40, 32)
    model = graph(TOKENS, TIED, {"table": table})
    QuantizeLinears("int8-rowwise", 127, excluded=["table"])(model)
    QuantizeEmbedding(127)(model)
    assert {name: array.shape for name, array in initializers(model, ir.DataType.INT8).items()} == {
        "table.rows.int8": (40, 32)
    }
    ids = RANDOM.integers(0, 40, (BATCH, NEW))
    (logits,) = compute(model, {"input_ids": ids})
    assert_close([logits], [np.tanh(embedding_reference(table, ids)) @ table.T])


def test_embedding_that_is_excluded_stays() -> None:
    model = graph(TOKENS, UNTIED, {"table": floats(40, 32), "head": floats(32, 40)})
    assert unchanged(QuantizeEmbedding(127, excluded=["table"]), model)


@pytest.mark.parametrize(
    "body",
    [
        "p = Abs(input_ids) e = Gather(table, p) h = Tanh(e) y = MatMul(h, head)",
        "e = Gather<axis=1>(turned, input_ids) s = Transpose<perm=[1,2,0]>(e) y = MatMul(s, head)",
    ],
    ids=["of other values than tokens", "along another axis"],
)
def test_embedding_gathers_of_another_kind_stay(body: str) -> None:
    weights = {"table": floats(40, 32), "turned": floats(32, 40), "head": floats(32, 40)}
    model = graph(TOKENS, body, weights)
    compute(model, {"input_ids": RANDOM.integers(0, 40, (BATCH, NEW))})
    assert unchanged(QuantizeEmbedding(127), model)


# QuantizeCache


def test_cache_holds_int8_of_the_documented_scales() -> None:
    body = PLAIN + ATTEND.format(out="y", q="q", k="k", v="v")
    weights = projections()
    model = attention_graph(body, weights, inputs=X)
    x = floats(BATCH, NEW, HIDDEN)
    feeds = {"attention_mask": np.ones((BATCH, NEW), np.int64), "x": x}
    empty = np.zeros((BATCH, 1, 0, 16), np.float32)
    plain = compute(model, {**feeds, "past_key_values.0.key": empty, "past_key_values.0.value": empty})
    key, value = x @ weights["wk"], x @ weights["wv"]
    largest = {"0.key": np.abs(key).max((0, 1))[None], "0.value": np.abs(value).max((0, 1))[None]}
    largest["0.value"][0, 3] /= 2  # the text had smaller values than these, which are clipped
    assert QuantizeCache(largest)(model).modified
    for name in ("past_key_values.0.key", "present.0.value"):
        found = [item for item in [*model.graph.inputs, *model.graph.outputs] if item.name == name]
        assert [item.dtype for item in found] == [ir.DataType.INT8]
    empty8 = empty.astype(np.int8)
    output, *present = compute(model, {**feeds, "past_key_values.0.key": empty8, "past_key_values.0.value": empty8})
    for name, stored, exact in zip(("0.key", "0.value"), present, (key, value), strict=True):
        scales = (largest[name] / 127).astype(np.float32)
        expected = np.clip(np.rint(exact / scales), -128, 127)
        assert stored.dtype == np.int8
        # Sums in another order than numpy's, so a value may round the other way.
        assert np.abs(stored[:, 0].astype(int) - expected).max() <= 1
        assert (stored[:, 0] == expected).mean() > 0.98
    channels = np.arange(32) % 16 != 3
    assert np.abs(output - plain[0])[..., channels].max() < 0.05 * np.abs(plain[0]).max()


def test_cache_of_a_channel_that_was_always_zero_is_finite() -> None:
    weights = projections()
    weights["wk"][:, 2] = 0
    model = attention_graph(PLAIN + ATTEND.format(out="y", q="q", k="k", v="v"), weights, inputs=X)
    largest = {"0.key": np.full((1, 16), 5, np.float32), "0.value": np.full((1, 16), 5, np.float32)}
    largest["0.key"][0, 2] = 0
    QuantizeCache(largest)(model)
    scales = model.graph.initializers["cache.0.key.scale"].const_value
    assert scales is not None
    assert (scales.numpy() > 0).all()
    empty = np.zeros((BATCH, 1, 0, 16), np.int8)
    feeds = {"attention_mask": np.ones((BATCH, NEW), np.int64), "x": floats(BATCH, NEW, HIDDEN)}
    output, key, _ = compute(model, {**feeds, "past_key_values.0.key": empty, "past_key_values.0.value": empty})
    assert np.isfinite(output).all()
    assert not key[..., 2].any()


def test_cache_raises_if_a_cache_stays_unquantized() -> None:
    """A cache that no attention operator reads keeps its type, which the runtime could not bind."""
    model = attention_graph(
        PLAIN + ATTEND.format(out="y", q="q", k="k", v="v") + "also = Exp(past_key_values.0.key)",
        projections(),
        inputs=f"{X}float[batch,1,past,16] stray, ",
        outputs=", float[batch,1,past,16] also",
    )
    next(value for value in model.graph.inputs if value.name == "stray").name = "past_key_values.1.key"
    sides = {"0.key": np.ones((1, 16), np.float32), "0.value": np.ones((1, 16), np.float32)}
    with pytest.raises(ir.passes.PostconditionError, match=r"past_key_values\.1\.key"):
        QuantizeCache(sides)(model)
