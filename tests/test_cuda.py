"""The cuda target: float16 graphs, arg-max in the graph, sessions on a device, messages without a GPU.

All but one test run on the CPU provider, which has the same operators in float16. None measures a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgelm.export import ExportConfig, export_model
from edgelm.export.errors import RecipeError, TraceError
from edgelm.export.passes.graph import ATTENTION
from edgelm.export.passes.pick_tokens import OUTPUT_NAME, PickTokens
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.bundle.manifest import Manifest
from edgelm.runtime.cli import main
from edgelm.runtime.decoding.row import Greedy, Row
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import EdgelmError, MemoryShortageError, SessionError, SettingsError
from edgelm.runtime.host.ort import can_start, load_onnxruntime
from edgelm.runtime.sessions import providers
from edgelm.runtime.sessions.graph import load_graph
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.loading import make_session
from edgelm.runtime.sessions.on_device import DeviceSession

from .conftest import TEXT, byte_tokenizer

IDS = list(TEXT[:40].encode())

# Operators of ONNX's own set 20 that onnxruntime computes on CUDA, with the version of the set that last changed each:
# a kernel for an older version is not used. From onnxruntime's docs/OperatorKernels.md, without those that our graphs
# never have. `Shape` returns its result on the CPU, where it is needed.
CUDA_OPERATORS = {
    "Add": 14, "Cast": 19, "Concat": 13, "Cos": 7, "Div": 14, "Erf": 13, "Exp": 13, "Expand": 13, "Gather": 13,
    "Gelu": 20, "LayerNormalization": 17, "Less": 13, "MatMul": 13, "Mul": 14, "Neg": 13, "Pow": 15, "Range": 11,
    "Reciprocal": 13, "ReduceMean": 18, "ReduceSum": 13, "Relu": 14, "Reshape": 19, "Shape": 19, "Sigmoid": 13,
    "Sin": 7, "Slice": 13, "Softmax": 13, "Split": 18, "Sqrt": 13, "Squeeze": 13, "Sub": 14, "Tanh": 13, "TopK": 11,
    "Transpose": 13, "Unsqueeze": 13, "Where": 16,
}  # fmt: skip
# Operators of com.microsoft and onnxruntime's own norm, which have one version.
CUDA_CONTRIB = {
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMulNBits",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}

# Inputs that CUDA kernels read on the CPU: sizes, positions and counts.
_ON_THE_CPU = {
    "Expand": (1,), "GroupQueryAttention": (6,), "Range": (0, 1, 2), "Reshape": (1,), "Slice": (1, 2, 3, 4),
    "Split": (1,), "Squeeze": (1,), "TopK": (1,), "Unsqueeze": (1,),
}  # fmt: skip


@pytest.fixture(scope="session")
def export_cuda(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export the tiny model for cuda, once a run for each scheme; returns the bundle's folder."""
    done: dict[str, Path] = {}

    def export(scheme: str = "int8-weight") -> Path:
        if scheme not in done:
            out = tmp_path_factory.mktemp("cuda") / scheme
            done[scheme] = export_model(ExportConfig(str(tiny_model), "cuda", scheme, out=out)).path
        return done[scheme]

    return export


def sessions(bundle: Path, captures: bool = False) -> tuple[DeviceSession, OrtSession]:
    """The same graph with device buffers, on the CPU here, and with numpy arrays."""
    model = Bundle.open(bundle).manifest.model
    inference = load_graph(bundle / GRAPH_NAME, 1, [providers.CPU])
    return DeviceSession(inference, captures, model, "cpu"), OrtSession(bundle / GRAPH_NAME, model, 1)


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_an_export_without_a_gpu_is_judged_on_the_cpu_and_says_so(
    export_cuda: Callable[..., Path], scheme: str
) -> None:
    bundle = Bundle.open(export_cuda(scheme))
    manifest, report = bundle.manifest, json.loads((bundle.path / "report.json").read_text())
    assert manifest.target.name == "cuda"
    assert manifest.target.settings["provider"] == providers.CUDA
    assert manifest.target.settings["activations"] == "float16"
    assert (manifest.quantization.scheme, manifest.model.kv.type) == (scheme, "float16")
    assert not manifest.exact_under_cuts
    (not_run,) = report["not_run"]
    assert "nothing ran on CUDAExecutionProvider" in not_run
    assert report["against_fp32"]["perplexity_increase_percent"] < 3
    assert report["genai"]["written"] is False


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_every_operator_has_a_kernel_for_its_version_on_cuda(export_cuda: Callable[..., Path], scheme: str) -> None:
    graph = ir.load(export_cuda(scheme) / GRAPH_NAME)
    assert graph.graph.opset_imports[""] == 20
    for node in graph.graph:
        if node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization":
            assert node.op_type in CUDA_CONTRIB
            continue
        since = onnx.defs.get_schema(node.op_type, 20, "").since_version
        assert CUDA_OPERATORS.get(node.op_type) == since, f"{node.op_type} of set {since}"


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_attention_and_weights_are_float16(export_cuda: Callable[..., Path], scheme: str) -> None:
    graph = ir.load(export_cuda(scheme) / GRAPH_NAME).graph
    kinds = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
    assert kinds["logits"] == ir.DataType.FLOAT
    assert kinds[OUTPUT_NAME] == ir.DataType.INT64
    assert {kind for name, kind in kinds.items() if name and ".key" in name} == {ir.DataType.FLOAT16}
    wide = [value.name for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert wide == []
    attention = next(node for node in graph if node.op_type == ATTENTION)
    assert attention.inputs[7] is not None and attention.inputs[7].dtype == ir.DataType.FLOAT16


def test_a_float16_graph_answers_nearly_as_the_fp32_graph(
    export_cuda: Callable[..., Path], export_tiny: Callable[..., Path]
) -> None:
    _, half = sessions(export_cuda("fp16"))
    whole = export_tiny(scheme="fp32")
    full = make_session(whole / GRAPH_NAME, Bundle.open(whole).manifest.model, 1)
    got, expected = half.step(IDS, len(IDS)), full.step(IDS, len(IDS))
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["gemma", "gpt2", "qwen3"])
def test_other_models_become_float16_too(tmp_path: Path, kind: str) -> None:
    """Norms with 1 + weight, learned positions and biases, norms per head."""
    import torch
    import transformers

    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    plain = {"vocab_size": 257, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config: Any = {
        "gemma": lambda: transformers.GemmaConfig(**sizes, **heads, initializer_range=0.2),
        "gpt2": lambda: transformers.GPT2Config(**plain, initializer_range=0.2),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, **heads, initializer_range=0.2),
    }[kind]()
    config.bos_token_id = config.eos_token_id = 256
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    done = export_model(ExportConfig(str(tmp_path / "model"), "cuda", "fp16", out=tmp_path / "out"))
    quality = done.report["against_fp32"]
    assert abs(quality["perplexity_increase_percent"]) < 0.5
    assert quality["decided_percent"] > 99


def picked(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ids that the arg-max graph picks from these logits."""
    value = ir.Value(
        name="x", shape=ir.Shape(["batch", "kept", logits.shape[-1]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type = "logits", value.type
    node.outputs[0].shape = value.shape
    model = ir.Model(ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 20}), ir_version=10)
    PickTokens()(model)
    session = load_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run([OUTPUT_NAME], {"x": logits})[0])


def test_the_graphs_arg_max_is_numpys() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 301)).astype(np.float32)
    np.testing.assert_array_equal(picked(logits), logits.argmax(-1))


def test_the_lowest_id_wins_a_tie() -> None:
    logits = np.round(np.random.default_rng(1).standard_normal((3, 7, 301))).astype(np.float32)
    logits[0, 0] = 0.0
    logits[0, 1] = -np.inf
    logits[0, 2, [5, 300]] = np.inf
    np.testing.assert_array_equal(picked(logits), logits.argmax(-1))


def test_nan_logits_still_give_a_valid_id() -> None:
    assert 0 <= picked(np.full((1, 1, 301), np.nan, np.float32))[0, 0] < 301


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_a_device_session_computes_what_a_session_of_arrays_does(export_cuda: Callable[..., Path], scheme: str) -> None:
    device, plain = sessions(export_cuda(scheme))
    for piece, keep in ((IDS[:7], 7), (IDS[7:8], 1), (IDS[8:30], 3)):
        np.testing.assert_array_equal(device.step(piece, keep), plain.step(piece, keep))
    device.rewind(9)
    plain.rewind(9)
    again = device.likeliest(IDS[9:14], 2)
    np.testing.assert_array_equal(again, plain.step(IDS[9:14], 2).argmax(-1))
    assert device.length == plain.length == 14
    with pytest.raises(ValueError, match="cannot rewind a session of 14 positions to 15"):
        device.rewind(15)


def test_buffers_on_a_device_grow_without_losing_anything(
    export_cuda: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.runtime.sessions.kv_cache._FIRST_DEVICE_CAPACITY", 8)
    device, plain = sessions(export_cuda())
    for begin in range(0, 40, 5):
        got, expected = device.step(IDS[begin : begin + 5], 5), plain.step(IDS[begin : begin + 5], 5)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_steps_of_fixed_shape_choose_the_same_tokens(
    export_cuda: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Shaped as for capture on a GPU: the mask is as long as the buffers. Covers growing buffers and a rewind."""
    monkeypatch.setattr("edgelm.runtime.sessions.kv_cache._FIRST_DEVICE_CAPACITY", 8)
    device, plain = sessions(export_cuda(scheme), captures=True)
    for length in (6, 3):
        device.rewind(0)
        plain.rewind(0)
        token = int(device.likeliest(IDS[:length])[0])
        assert token == plain.step(IDS[:length])[0].argmax()
        for _ in range(30):
            following = int(device.likeliest([token])[0])
            assert following == plain.step([token])[0].argmax()
            token = following
    assert device._captured._graphs == 4  # buffers of 8, 16, 32 and 64 positions


def test_ordinary_steps_read_what_captured_steps_wrote(export_cuda: Callable[..., Path]) -> None:
    device, plain = sessions(export_cuda("fp16"), captures=True)
    for session in (device, plain):
        session.step(IDS[:5])
    for token in IDS[5:9]:
        device.likeliest([token])
        plain.step([token])
    np.testing.assert_array_equal(device.step(IDS[9:12], 3), plain.step(IDS[9:12], 3))


@pytest.mark.parametrize("scheme", ["int8-weight", "fp16"])
def test_nothing_that_the_gpu_computes_is_read_on_the_cpu(export_cuda: Callable[..., Path], scheme: str) -> None:
    """onnxruntime cannot capture a graph that copies between GPU and CPU. On the CPU it keeps values computed from
    shapes; apart from these, kernels there read only inputs and small constants."""
    graph = ir.load(export_cuda(scheme) / GRAPH_NAME).graph
    here = {value for node in graph for value in node.outputs if node.op_type == "Shape"}
    free = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        if any(value in here for value in node.inputs) and all(value in here | free for value in node.inputs):
            here.update(node.outputs)
    wanted = [
        (node, index) for node in graph for index in _ON_THE_CPU.get(node.op_type, ()) if index < len(node.inputs)
    ]
    assert {node.op_type for node, _ in wanted} >= {"Slice", "GroupQueryAttention"}
    for node, index in wanted:
        assert node.inputs[index] in here | free, f"{node.op_type} waits for {node.inputs[index]}"
    for node in graph:
        if not set(node.outputs) <= here:
            places = _ON_THE_CPU.get(node.op_type, ())
            copied = [value for index, value in enumerate(node.inputs) if value in here and index not in places]
            assert copied == [], f"{node.op_type} reads {copied} from the CPU"


def test_a_device_takes_no_memory_for_draft_tokens(
    export_cuda: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.runtime.sessions.kv_cache._FIRST_DEVICE_CAPACITY", 8)
    device, _ = sessions(export_cuda())
    device.expect(24)
    device.step([1, 2, 3])
    assert device._cache.capacity == 8


def test_greedy_decoding_takes_one_id_and_no_logits(
    export_cuda: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, plain = sessions(export_cuda())
    expected = list(Sequencer(plain).greedy(IDS, 12, ()))

    def refuse(*_: Any) -> NDArray[np.float32]:
        raise AssertionError("logits were copied")

    monkeypatch.setattr(device, "step", refuse)
    assert list(Sequencer(device).greedy(IDS, 12, ())) == expected


def test_other_choosers_get_their_logits(export_cuda: Callable[..., Path]) -> None:
    class Second(Greedy):
        def choose(self, logits: NDArray[np.float32]) -> int:
            return int(np.argsort(logits)[-2])

    device, plain = sessions(export_cuda())
    tokens = [list(Sequencer(session).tokens(Row(IDS, 6, Second()))) for session in (device, plain)]
    assert tokens[0] == tokens[1]


def test_a_bundle_for_a_gpu_runs_on_the_cpu_when_told_to(
    export_cuda: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with load(export_cuda(), provider="cpu") as engine:
        done = engine.generate("Once upon a time", max_tokens=8)
        sampled = engine.generate("Once upon a time", max_tokens=8, temperature=0.7, seed=1, logprobs=2)
    assert len(done.token_ids) == len(sampled.token_ids) == 8
    assert main(["run", str(export_cuda()), "Once upon a time", "--max-tokens", "8", "--provider", "cpu"]) == 0
    assert done.text in capsys.readouterr().out


def bundle_for(manifest: Manifest, provider: str, name: str = "somewhere") -> Manifest:
    settings = {**manifest.target.settings, "provider": provider}
    return dataclasses.replace(manifest, target=dataclasses.replace(manifest.target, name=name, settings=settings))


CPU_ONLY = ("AzureExecutionProvider", providers.CPU)
WITH_GPU = (providers.CUDA, providers.CPU)


@pytest.mark.parametrize(
    ("made_for", "asked", "available", "chosen"),
    [
        (providers.CPU, None, CPU_ONLY, providers.CPU),
        (providers.CPU, None, WITH_GPU, providers.CPU),
        (providers.CUDA, None, WITH_GPU, providers.CUDA),
        (providers.CUDA, "cuda", WITH_GPU, providers.CUDA),
        (providers.CUDA, "cpu", CPU_ONLY, providers.CPU),
        (providers.CUDA, "cpu", WITH_GPU, providers.CPU),
    ],
)
def test_the_provider_is_the_bundles_unless_told_otherwise(
    tiny_bundle: Path, made_for: str, asked: str | None, available: Sequence[str], chosen: str
) -> None:
    manifest = bundle_for(Bundle.open(tiny_bundle).manifest, made_for)
    assert providers.choose_provider(manifest, asked, available) == chosen


@pytest.mark.parametrize(
    ("made_for", "asked", "available", "error", "words"),
    [
        (providers.CUDA, None, CPU_ONLY, SessionError, "pip install onnxruntime-gpu,  or run it on the CPU"),
        (providers.CUDA, "cuda", CPU_ONLY, SessionError, "has no CUDAExecutionProvider"),
        (providers.CPU, "cuda", WITH_GPU, SessionError, "no kernels on a GPU: export the model with  --target cuda"),
        (providers.CPU, "tpu", WITH_GPU, SettingsError, "provider must be cpu or cuda, found 'tpu'"),
        ("DmlExecutionProvider", None, CPU_ONLY, SessionError, "has no DmlExecutionProvider: install"),
    ],
)
def test_a_missing_provider_is_an_error_with_a_remedy(
    *,
    tiny_bundle: Path,
    made_for: str,
    asked: str | None,
    available: Sequence[str],
    error: type[EdgelmError],
    words: str,
) -> None:
    manifest = bundle_for(Bundle.open(tiny_bundle).manifest, made_for)
    with pytest.raises(error, match=words.replace("'", ".")):
        providers.choose_provider(manifest, asked, available)


def test_loading_a_bundle_for_a_gpu_without_one_is_one_line(
    export_cuda: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if providers.CUDA in load_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    assert main(["run", str(export_cuda()), "Once"]) == 1
    message = capsys.readouterr().err
    assert "onnxruntime-gpu" in message and message.count("\n") == 1


def test_a_provider_that_onnxruntime_could_not_start_is_no_silent_cpu() -> None:
    providers.require_used(providers.CUDA, [providers.CUDA, providers.CPU])
    with pytest.raises(SessionError, match=r"could not start it: see that  nvidia-smi"):
        providers.require_used(providers.CUDA, [providers.CPU])


class _FullGpu:
    """Fakes onnxruntime's session on a GPU without free memory."""

    def io_binding(self) -> Any:
        class Binding:
            def __getattr__(self, _: str) -> Callable[..., None]:
                return lambda *_: None

        return Binding()

    def run_with_iobinding(self, *_: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);")


def test_a_full_gpu_is_an_error_with_a_remedy(tiny_bundle: Path) -> None:
    model = Bundle.open(tiny_bundle).manifest.model
    session = DeviceSession(_FullGpu(), False, model, "cpu")
    with pytest.raises(MemoryShortageError, match=r"a step of 3 tokens at position 0 takes more memory than there is"):
        session.step([1, 2, 3])
    assert session.length == 0


def test_a_bundle_for_another_kind_of_cpu_runs_with_a_warning(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(providers.platform, "machine", lambda: "riscv64")
    with load(tiny_bundle, prepare=False) as engine:
        assert engine.generate("Once", max_tokens=2).token_ids
    assert "was made for x86-cpu, and this is riscv64: it runs" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "int8-rowwise"}, "cuda computes in float16, which has no scheme 'int8-rowwise'"),
        ({"scheme": "fp32"}, "there is int8-weight, int4-weight, fp16"),
        ({"kv": "int8"}, "a KV cache cannot be int8: it can be float16"),
    ],
)
def test_what_a_gpu_cannot_compute_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        export_model(ExportConfig(str(tiny_model), "cuda", out=tmp_path / "out", **settings))


def test_float16_schemes_and_caches_are_not_for_cpus(tiny_model: Path, tmp_path: Path) -> None:
    for settings in ({"scheme": "fp16"}, {"kv": "float16"}):
        with pytest.raises(RecipeError, match="x86-cpu computes in float32"):
            export_model(ExportConfig(str(tiny_model), "x86-cpu", out=tmp_path / "out", **settings))


def test_a_model_whose_attention_is_not_fused_is_refused(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=257, hidden_size=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    transformers.BloomForCausalLM(config).eval().save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    with pytest.raises(TraceError, match=r"attention is not fused, which float16 activations need"):
        export_model(ExportConfig(str(tmp_path / "model"), "cuda", out=tmp_path / "out"))


def test_gpu_names_are_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_GPUS", tmp_path)
    assert providers.gpu_names() == ()
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA Test 1\nIRQ: 7\n")
    assert providers.gpu_names() == ("NVIDIA Test 1",)


def test_the_same_tokens_on_a_gpu(export_cuda: Callable[..., Path]) -> None:
    """Needs a GPU: decoding there, with no operator on the CPU, against the CPU provider."""
    if not can_start(providers.CUDA):
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU")
    with load(export_cuda(), provider="cpu", response_cache=False) as engine:
        expected = engine.generate("Once upon a time", max_tokens=16)
    with load(export_cuda(), response_cache=False) as engine:
        assert isinstance(engine._session, DeviceSession)
        got = engine.generate("Once upon a time", max_tokens=16)
    # Near-ties may make the two diverge, but not this early: the model's logits are far apart.
    assert got.token_ids[:8] == expected.token_ids[:8]


@pytest.mark.parametrize(
    ("listed", "started", "starts"), [(False, False, False), (True, False, False), (True, True, True)]
)
def test_a_provider_is_available_only_if_it_starts(
    monkeypatch: pytest.MonkeyPatch, listed: bool, started: bool, starts: bool
) -> None:
    """onnxruntime-gpu lists CUDA everywhere and falls back to the CPU if CUDA does not start."""
    onnxruntime = load_onnxruntime()
    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, graph: bytes, providers: list[str]) -> None:
            real(graph, providers=["CPUExecutionProvider"])  # the graph itself is valid

        def get_providers(self) -> list[str]:
            return [providers.CUDA, providers.CPU] if started else [providers.CPU]

    known = [providers.CUDA, providers.CPU] if listed else [providers.CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert can_start(providers.CUDA) == starts
    assert can_start(providers.CPU)
