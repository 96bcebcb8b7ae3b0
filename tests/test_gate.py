"""The gate: it catches faults planted in fp32 and INT8 graphs, and passes correct graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgelm.export.gate import verify
from edgelm.export.gate.quality import QuantizedAgreement, faults
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.graph import ATTENTION
from edgelm.export.quantization.calibration import cache_ranges
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model
from edgelm.runtime.errors import SessionError, VerificationError
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.protocol import KERNELS_PIECE_TOKENS, Capabilities, Session
from edgelm.targets import load_target

from .conftest import TEXT, compare_texts, tiny_llama

GATE = load_target("x86-cpu").gate
CONTEXT = 512
WINDOW = 128
IDS = list(TEXT[:1200].encode())
WINDOWS = [IDS[begin : begin + WINDOW] for begin in range(0, len(IDS), WINDOW)]


@dataclass(frozen=True)
class Exported:
    """The tiny model, its fused fp32 graph as a file, and its calibration data."""

    model: Any
    folder: Path
    layers: tuple[LayerCache | None, ...]
    ranges: dict[str, NDArray[np.float32]]

    def described(self, kv: str = "float32") -> Model:
        return Model(257, CONTEXT, self.model.num_parameters(), self.layers, CacheType(kv, None))

    def session(self, folder: Path, kv: str = "float32") -> OrtSession:
        return OrtSession(folder / "model.onnx", self.described(kv), 2)

    def compare(self, session: Session) -> verify.SourceAgreement:
        """Compare the model with a session on the fp32 graph or on a changed one."""
        return verify.compare_with_source(answers_of(self.model, self.described(), self.folder), session, GATE)

    def graph(self) -> ir.Model:
        """The fp32 graph, to be changed."""
        return ir.load(self.folder / "model.onnx")


@functools.cache
def answers_of(model: Any, shape: Model, folder: Path) -> verify.SourceAnswers:
    return verify.ask_source(model, IDS, shape, folder)


def save(graph: ir.Model, folder: Path) -> None:
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Threads slow each other down in models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    fp32 = export_fp32(tiny_llama(), tmp_path_factory.mktemp("fp32"))
    return dataclasses.replace(fp32, ranges=cache_ranges(fp32.session(fp32.folder), WINDOWS))


def export_fp32(model: Any, folder: Path) -> Exported:
    traced = trace_model(model)
    ir.passes.PassManager(fusing_passes(CONTEXT))(traced.graph)
    save(traced.graph, folder)
    return Exported(model, folder, traced.layers, {})


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model with a sliding window that only the longest prompt with its continuation exceeds."""
    return export_fp32(tiny_mistral(), tmp_path_factory.mktemp("windowed"))


@pytest.fixture(scope="module")
def plus_one(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model whose norms multiply by 1 + weight, with an untied head."""
    return export_fp32(tiny_gemma(), tmp_path_factory.mktemp("plus-one"))


SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def tiny_mistral() -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=200)).eval()


def tiny_gemma() -> Any:
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.1)
    return model


def nodes(graph: ir.Model, *kinds: str) -> list[ir.Node]:
    found = [node for node in graph.graph if node.op_type in kinds]
    assert found, f"the graph has no {kinds}, so the fault cannot be planted"
    return found


def change(graph: ir.Model, name: str, edit: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Replace an initializer's data by the result of `edit`."""
    value = graph.graph.initializers[name]
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = np.array(edit(before.copy()), order="C")
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert not np.array_equal(after, before), "the fault changes nothing"
    value.const_value = ir.tensor(after, name=name)


def named(graph: ir.Model, *parts: str) -> str:
    """The one initializer whose name contains all the parts."""
    (name,) = [name for name in graph.graph.initializers if all(part in name for part in parts)]
    return name


# Faults of the fp32 graph.


def scaled_attention(graph: ir.Model) -> None:
    for node in nodes(graph, ATTENTION):
        node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes.get_float("scale", 0.0) * 1.1)


def forgotten_rotation_of_a_layer(graph: ir.Model) -> None:
    nodes(graph, ATTENTION)[1].attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)


def interleaved_rotation(graph: ir.Model) -> None:
    for node in nodes(graph, ATTENTION):
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def swapped_halves_of_the_rotary_tables(graph: ir.Model) -> None:
    for name in ("rotary.cos", "rotary.sin"):
        change(graph, name, lambda table: np.roll(table, table.shape[1] // 2, axis=1))


def swapped_rotary_tables(graph: ir.Model) -> None:
    for node in nodes(graph, ATTENTION):
        cos, sin = node.inputs[7], node.inputs[8]
        node.replace_input_with(7, sin)
        node.replace_input_with(8, cos)


def wrong_epsilon(graph: ir.Model) -> None:
    for node in nodes(graph, "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", 0.0) * 1000)


def lengths_off_by_one(graph: ir.Model) -> None:
    (lengths,) = {node.inputs[5] for node in nodes(graph, ATTENTION)}
    assert lengths is not None
    one = ir.Value(
        name="one", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32), const_value=ir.tensor(np.int32(1))
    )
    graph.graph.register_initializer(one)
    first = nodes(graph, ATTENTION)[0]
    later = ir.node("Add", [lengths, one])
    later.outputs[0].name = "lengths.later"
    graph.graph.insert_before(first, later)
    for node in nodes(graph, ATTENTION):
        node.replace_input_with(5, later.outputs[0])


def a_column_of_zeros(graph: ir.Model) -> None:
    def clear(weight: NDArray[Any]) -> NDArray[Any]:
        weight[3] = 0
        return weight

    change(graph, named(graph, "layers.1", "down_proj", "weight"), clear)


def swapped_query_heads(graph: ir.Model) -> None:
    def swap(weight: NDArray[Any]) -> NDArray[Any]:
        assert weight.shape == (64, 64 + 32 + 32), "queries, keys and values are not merged"
        weight[:, :32] = np.roll(weight[:, :32], 16, axis=1)
        return weight

    change(graph, named(graph, "layers.0", "q_proj"), swap)


def forgotten_residual(graph: ir.Model) -> None:
    node = nodes(graph, "SkipSimplifiedLayerNormalization")[1]
    node.replace_input_with(0, node.inputs[1])


def norm_weight_a_percent_off(graph: ir.Model) -> None:
    weight = nodes(graph, "SimplifiedLayerNormalization")[0].inputs[1]
    assert weight is not None
    change(graph, str(weight.name), lambda values: values - np.float32(0.01))


def a_window_that_the_model_does_not_have(graph: ir.Model) -> None:
    for node in nodes(graph, ATTENTION):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 40)


def another_activation(graph: ir.Model) -> None:
    for node in nodes(graph, "Sigmoid"):
        node.op_type = "Tanh"


FP32_FAULTS = [
    scaled_attention,
    forgotten_rotation_of_a_layer,
    interleaved_rotation,
    swapped_halves_of_the_rotary_tables,
    swapped_rotary_tables,
    wrong_epsilon,
    lengths_off_by_one,
    a_column_of_zeros,
    swapped_query_heads,
    forgotten_residual,
    norm_weight_a_percent_off,
    a_window_that_the_model_does_not_have,
    another_activation,
]


def test_a_right_fp32_graph_passes(exported: Exported) -> None:
    session = exported.session(exported.folder)
    found = exported.compare(session)
    assert found.logit_difference < GATE.logit_difference / 3
    assert found.steps == found.equal_steps == 4 * 32 + 3 * 16
    assert found.near_ties == 0
    assert found.prompts == 7
    assert found.longest_prompt == KERNELS_PIECE_TOKENS + 40
    assert found.left_out == ()


@pytest.mark.parametrize("fault", FP32_FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_fp32_graph_is_caught(exported: Exported, tmp_path: Path, fault: Callable[[ir.Model], None]) -> None:
    refuse(exported, tmp_path, fault)


def refuse(exported: Exported, folder: Path, fault: Callable[[ir.Model], None]) -> None:
    """Plant a fault, which the comparison with the model must find."""
    graph = exported.graph()
    fault(graph)
    save(graph, folder)
    session = exported.session(folder)
    with pytest.raises(VerificationError, match=r"traced graph.* cannot be exported"):
        exported.compare(session)


# Faults that need a model of another kind.


def a_window_one_token_longer(graph: ir.Model) -> None:
    move_windows(graph, 1)


def a_window_one_token_shorter(graph: ir.Model) -> None:
    move_windows(graph, -1)


def move_windows(graph: ir.Model, tokens: int) -> None:
    for node in nodes(graph, ATTENTION):
        window = node.attributes.get_int("local_window_size", 0)
        assert window == 200
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window + tokens)


def forgotten_window_of_a_layer(graph: ir.Model) -> None:
    nodes(graph, ATTENTION)[0].attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)


def norms_without_their_one(graph: ir.Model) -> None:
    for node in nodes(graph, "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
        weight = node.inputs[1 if node.op_type == "SimplifiedLayerNormalization" else 2]
        assert weight is not None
        change(graph, str(weight.name), lambda values: values - np.float32(1))


def a_last_norm_without_its_one(graph: ir.Model) -> None:
    weight = nodes(graph, "SkipSimplifiedLayerNormalization")[-1].inputs[2]
    assert weight is not None
    change(graph, str(weight.name), lambda values: values - np.float32(1))


def embedding_not_scaled(graph: ir.Model) -> None:
    change(graph, "model.embed_tokens.weight", lambda table: table / np.float32(8))


def rows_of_the_embedding_that_the_text_does_not_use(graph: ir.Model) -> None:
    unused = sorted(set(range(257)).difference(IDS))

    def clear(table: NDArray[Any]) -> NDArray[Any]:
        table[unused] = 0
        return table

    change(graph, "model.embed_tokens.weight", clear)


def positions_one_earlier_in_the_last_layer(graph: ir.Model) -> None:
    """The last layer sees each step as if it began one token earlier."""
    (lengths,) = {node.inputs[5] for node in nodes(graph, ATTENTION)}
    assert lengths is not None
    one = ir.Value(
        name="one", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32), const_value=ir.tensor(np.int32(1))
    )
    graph.graph.register_initializer(one)
    last = nodes(graph, ATTENTION)[-1]
    earlier = ir.node("Sub", [lengths, one])
    earlier.outputs[0].name = "lengths.earlier"
    graph.graph.insert_before(last, earlier)
    last.replace_input_with(5, earlier.outputs[0])


WINDOW_FAULTS = [a_window_one_token_longer, a_window_one_token_shorter, forgotten_window_of_a_layer]
PLUS_ONE_FAULTS = [
    norms_without_their_one,
    a_last_norm_without_its_one,
    embedding_not_scaled,
    rows_of_the_embedding_that_the_text_does_not_use,
    positions_one_earlier_in_the_last_layer,
]


def test_a_right_graph_with_a_window_passes(windowed: Exported) -> None:
    found = windowed.compare(windowed.session(windowed.folder))
    assert found.equal_steps == found.steps
    assert found.longest_prompt > 200


@pytest.mark.parametrize("fault", WINDOW_FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_window_is_caught(windowed: Exported, tmp_path: Path, fault: Callable[[ir.Model], None]) -> None:
    refuse(windowed, tmp_path, fault)


def test_a_right_graph_with_norms_of_one_plus_weight_passes(plus_one: Exported) -> None:
    found = plus_one.compare(plus_one.session(plus_one.folder))
    assert found.equal_steps == found.steps


@pytest.mark.parametrize("fault", PLUS_ONE_FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_graph_with_norms_of_one_plus_weight_is_caught(
    plus_one: Exported, tmp_path: Path, fault: Callable[[ir.Model], None]
) -> None:
    refuse(plus_one, tmp_path, fault)


class Spoiled:
    """A session that changes the logits it returns."""

    def __init__(self, session: Session, spoil: Callable[[NDArray[np.float32]], None]) -> None:
        self._session = session
        self._spoil = spoil

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @property
    def length(self) -> int:
        return self._session.length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        logits = self._session.step(token_ids, keep).copy()
        self._spoil(logits)
        return logits

    def expect(self, positions: int) -> None:
        self._session.expect(positions)

    def rewind(self, length: int) -> None:
        self._session.rewind(length)

    def close(self) -> None:
        self._session.close()


def test_nan_logits_are_caught_in_rows_that_choose_no_token(exported: Exported) -> None:
    """Only rows from which no token is chosen: the greedy tokens are torch's."""

    def spoil(logits: NDArray[np.float32]) -> None:
        logits[:-1] = np.nan

    session = Spoiled(exported.session(exported.folder), spoil)
    with pytest.raises(VerificationError):
        exported.compare(session)


def test_a_model_with_nan_logits_is_caught(exported: Exported) -> None:
    """Two graphs that give only NaN agree in every token, but neither is a model."""
    import torch

    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))

    def spoil(logits: NDArray[np.float32]) -> None:
        logits[:] = np.nan

    with pytest.raises(VerificationError):
        dataclasses.replace(exported, model=model).compare(Spoiled(exported.session(exported.folder), spoil))


def test_a_near_tie_is_no_fault_but_is_counted(exported: Exported) -> None:
    """Logits off by far less than the tolerance, in favour of another token with the same logit in torch."""
    import torch

    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.load_state_dict({**exported.model.state_dict()})
        model.lm_head.weight[1::2] = model.lm_head.weight[:-1:2]

    def spoil(logits: NDArray[np.float32]) -> None:
        # As the changed head would give: tokens in pairs, the odd one slightly ahead.
        logits[:, 1::2] = logits[:, :-1:2] + 1e-5

    found = dataclasses.replace(exported, model=model).compare(Spoiled(exported.session(exported.folder), spoil))
    assert 0 < found.near_ties <= found.prompts
    assert found.equal_steps < found.steps == 4 * 32 + 3 * 16


def test_a_difference_beyond_the_tolerance_is_caught_though_all_tokens_are_the_same(exported: Exported) -> None:
    largest = float(np.abs(exported.session(exported.folder).step(IDS[:64], 64)).max())

    def spoil(logits: NDArray[np.float32]) -> None:
        logits -= 3 * GATE.logit_difference * largest

    session = Spoiled(exported.session(exported.folder), spoil)
    with pytest.raises(VerificationError, match="logits are off by"):
        exported.compare(session)


# Faults of the INT8 graph.


def doubled_scales(graph: ir.Model) -> None:
    change(graph, named(graph, "layers.0", "down_proj", ".scale"), lambda scales: scales * 2)


def scales_of_a_neighbour(graph: ir.Model) -> None:
    change(graph, named(graph, "layers.1", "q_proj", ".scale"), lambda scales: scales[::-1])


def saturated_weights(graph: ir.Model) -> None:
    def saturate(weight: NDArray[Any]) -> NDArray[Any]:
        return np.clip(weight.astype(np.int32) * 3, -127, 127).astype(np.int8)

    change(graph, named(graph, "layers.1", "gate_proj", ".int8"), saturate)


def cache_scales_too_small(graph: ir.Model) -> None:
    for name in [name for name in graph.graph.initializers if name.startswith("cache.")]:
        change(graph, name, lambda scales: scales / 10)


def cache_scales_too_large(graph: ir.Model) -> None:
    for name in [name for name in graph.graph.initializers if name.startswith("cache.")]:
        change(graph, name, lambda scales: scales * 100)


def a_scale_that_is_no_number(graph: ir.Model) -> None:
    change(graph, named(graph, "layers.0", "down_proj", ".scale"), lambda scales: scales * np.float32("nan"))


INT8_FAULTS = [
    doubled_scales,
    scales_of_a_neighbour,
    saturated_weights,
    cache_scales_too_small,
    cache_scales_too_large,
    a_scale_that_is_no_number,
]


def quantized(exported: Exported) -> ir.Model:
    graph = exported.graph()
    ir.passes.PassManager(quantizing_passes("int8-rowwise", 8, exported.ranges))(graph)
    return graph


@pytest.fixture
def compare(exported: Exported, tmp_path: Path) -> Iterator[Callable[[ir.Model], QuantizedAgreement]]:
    """Judge a quantized graph with an INT8 cache as the export does."""

    def judge(graph: ir.Model) -> QuantizedAgreement:
        save(graph, tmp_path)
        before, after = exported.session(exported.folder), exported.session(tmp_path, "int8")
        return compare_texts(before, after, IDS, WINDOW, GATE)

    yield judge


def test_a_right_int8_graph_passes(exported: Exported, compare: Callable[[ir.Model], QuantizedAgreement]) -> None:
    found = compare(quantized(exported))
    assert found.tokens == len(IDS) - len(WINDOWS)
    assert abs(found.perplexity_increase_percent) <= GATE.perplexity_increase_percent
    assert found.decided_percent >= GATE.agreement_percent
    assert 0 < found.decided_positions < found.tokens
    assert found.agreement_percent < 100, "INT8 and fp32 compute the same, so nothing was quantized"


@pytest.mark.parametrize("fault", INT8_FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_int8_graph_is_caught(
    exported: Exported,
    compare: Callable[[ir.Model], QuantizedAgreement],
    fault: Callable[[ir.Model], None],
) -> None:
    graph = quantized(exported)
    fault(graph)
    try:
        found = compare(graph)
    except SessionError:  # kernels refuse values that are not finite
        assert fault is a_scale_that_is_no_number
        return
    assert faults(found, GATE)


def test_the_tolerances_decide(exported: Exported) -> None:
    """The same two graphs, judged by limits at their measured values and slightly below."""
    before = exported.session(exported.folder)

    def spoil(logits: NDArray[np.float32]) -> None:
        logits *= np.float32(0.9)

    def judge(gate: Any) -> QuantizedAgreement:
        after = Spoiled(exported.session(exported.folder), spoil)
        return compare_texts(before, after, IDS[:400], WINDOW, gate)

    wide = dataclasses.replace(GATE, mean_kl=9.0, p99_kl=9.0)
    found = dataclasses.replace(judge(wide), perplexity_error_percent=0.0)
    rise = found.perplexity_increase_percent
    assert rise != 0
    assert faults(found, dataclasses.replace(wide, perplexity_increase_percent=rise + 1e-6)) == []
    (fault,) = faults(found, dataclasses.replace(wide, perplexity_increase_percent=rise - 1e-6))
    assert fault.startswith("perplexity rises by")
