"""Folders of other exporters: optimum's files (tests/fixtures/optimum) run with the tokens of transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgelm.runtime import load
from edgelm.runtime.bundle.onnx_file import operators, weight_files
from edgelm.runtime.cli import main
from edgelm.runtime.errors import (
    BundleCorruptError,
    BundleMissingError,
    BundleUnsupportedError,
    EdgelmError,
    SessionError,
    SettingsError,
)
from edgelm.runtime.sessions import foreign
from edgelm.runtime.sessions.loading import open_folder
from edgelm.runtime.sessions.protocol import Session

from .conftest import ROOT
from .test_imports import BLOCKER, HEAVY

FIXTURE = ROOT / "tests" / "fixtures" / "optimum"
EXPECTED: list[dict[str, Any]] = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
IDS: list[int] = EXPECTED[2]["prompt_ids"][:40]


def lay_out(folder: Path, **files: str) -> Path:
    """A folder with the fixture's configuration and tokenizer, and graphs: name=source, "__" means "/"."""
    folder.mkdir(exist_ok=True)
    for name in TEXTS:
        shutil.copyfile(FIXTURE / name, folder / name)
    for name, source in files.items():
        path = folder / (name.replace("__", "/") + ".onnx")
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(FIXTURE / f"{source}.onnx", path)
    return folder


def external(folder: Path) -> Path:
    """Weights in a file beside the graph, as in large models."""
    lay_out(folder)
    (folder / "onnx").mkdir()
    graph = onnx.load(FIXTURE / "model.onnx")
    onnx.save(
        graph, folder / "onnx" / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=64
    )
    return folder


def half(folder: Path) -> Path:
    """In float16, as transformers.js converts it."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    lay_out(folder)
    onnx.save(convert_float_to_float16(onnx.load(FIXTURE / "model.onnx")), folder / "model_fp16.onnx")
    return folder


PAIR = {"decoder_model": "decoder_model", "decoder_with_past_model": "model"}
FORMS: dict[str, Callable[[Path], Path]] = {
    "one file": lambda folder: lay_out(folder, model="model"),
    "in onnx": lambda folder: lay_out(folder, onnx__model="model"),
    "pair": lambda folder: lay_out(folder, **PAIR),
    "merged": lambda folder: lay_out(folder, onnx__decoder_model_merged="decoder_model_merged"),
    "pair and merged": lambda folder: lay_out(folder, **PAIR, decoder_model_merged="decoder_model_merged"),
    "with past only": lambda folder: lay_out(folder, decoder_with_past_model="model"),
    "external data": external,
}


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder in each published form."""
    return FORMS[request.param](tmp_path / "model")


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A folder laid out like onnx-community's: one model in several precisions."""
    return lay_out(tmp_path / "model", onnx__model="model", onnx__model_q8="model_quantized")


def logits(session: Session, pieces: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    return np.concatenate([session.step(piece, len(piece)).copy() for piece in pieces])


def test_the_tokens_are_those_of_transformers(folder: Path) -> None:
    with load(folder, response_cache=False) as engine:
        for case in EXPECTED:
            done = engine.generate(case["prompt"], max_tokens=len(case["tokens"]))
            assert done.token_ids == tuple(case["tokens"])
            assert engine.encode(case["prompt"]) == case["prompt_ids"]


@pytest.mark.parametrize("name", ["model_quantized", "model_q8", "model_int8", "model_uint8"])
def test_a_quantized_file_gives_the_tokens_that_optimum_gives_with_it(tmp_path: Path, name: str) -> None:
    folder = lay_out(tmp_path / "model", **{f"onnx__{name}": "model_quantized"})
    with load(folder, response_cache=False) as engine:
        for case in EXPECTED:
            done = engine.generate(case["prompt"], max_tokens=len(case["tokens"]))
            assert done.token_ids == tuple(case["tokens_quantized"])


def test_a_float16_cache(tmp_path: Path) -> None:
    bundle, session = open_folder(half(tmp_path / "half"))
    assert bundle.manifest.model.kv.type == "float16"
    _, full = open_folder(lay_out(tmp_path / "full", model="model"))
    found = logits(session, [IDS[:20], IDS[20:21], IDS[21:]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, logits(full, [IDS]), atol=0.05)


@pytest.mark.parametrize(("name", "shape"), [("num_logits_to_keep", []), ("logits_to_keep", [1])])
def test_a_graph_with_an_input_for_the_number_of_logits(tmp_path: Path, name: str, shape: list[int]) -> None:
    """As in onnx-community's models; without the input they compute logits for the whole prompt."""
    folder = lay_out(tmp_path / "model")
    model = onnx.load(FIXTURE / "model.onnx")
    (producer,) = [node for node in model.graph.node if "logits" in node.output]
    producer.output[0] = "all_logits"
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    for constant, value in (("flat", -1), ("one", 1), ("end", 2**31)):
        model.graph.initializer.append(helper.make_tensor(constant, TensorProto.INT64, [1], [value]))
    model.graph.node.extend(
        [
            helper.make_node("Reshape", [name, "flat"], ["count"]),
            helper.make_node("Neg", ["count"], ["begin"]),
            helper.make_node("Slice", ["all_logits", "begin", "end", "one"], ["logits"]),
        ]
    )
    onnx.save(model, folder / "model.onnx")
    _, session = open_folder(folder)
    _, plain = open_folder(lay_out(tmp_path / "plain", model="model"))
    for keep in (1, 5):
        assert (session.step(IDS[:9], keep) == plain.step(IDS[:9], keep)).all()


def test_a_graph_of_the_last_logits_only_can_generate_but_not_score(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "model")
    model = onnx.load(FIXTURE / "model.onnx")
    (producer,) = [node for node in model.graph.node if "logits" in node.output]
    producer.output[0] = "all_logits"
    for constant, value in (("one", 1), ("begin", -1), ("end", 2**31)):
        model.graph.initializer.append(helper.make_tensor(constant, TensorProto.INT64, [1], [value]))
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "begin", "end", "one"], ["logits"]))
    onnx.save(model, folder / "model.onnx")
    with load(folder) as engine:
        done = engine.generate(EXPECTED[0]["prompt"], max_tokens=24)
    assert done.token_ids == tuple(EXPECTED[0]["tokens"])
    _, session = open_folder(folder)
    with pytest.raises(SessionError, match="score"):
        session.step(IDS[:9], 5)
    assert session.length == 0


def test_cuts_and_rewinds_do_not_change_a_float_model(folder: Path) -> None:
    _, session = open_folder(folder, threads=1)
    whole = logits(session, [IDS])
    assert whole.shape == (len(IDS), 257) and session.length == len(IDS)
    session.rewind(0)
    np.testing.assert_allclose(logits(session, [IDS[:1], IDS[1:8], IDS[8:9], IDS[9:]]), whole, atol=1e-4)
    session.rewind(13)
    assert session.length == 13
    np.testing.assert_allclose(logits(session, [IDS[13:30], IDS[30:]]), whole[13:], atol=1e-4)
    session.rewind(1)
    np.testing.assert_allclose(session.step(IDS[1:9], 3), whole[6:9], atol=1e-4)


def test_a_conversation_reuses_what_is_in_the_cache(folder: Path) -> None:
    with load(folder, response_cache=False) as engine:
        first = engine.generate(token_ids=IDS, max_tokens=8)
        again = engine.generate(token_ids=[*IDS, *first.token_ids], max_tokens=8)
        assert again.stats.reused_tokens == len(IDS) + 7
    with load(folder, response_cache=False) as fresh:
        assert fresh.generate(token_ids=[*IDS, *first.token_ids], max_tokens=8).token_ids == again.token_ids


def test_facts_of_a_model_without_a_manifest(several: Path) -> None:
    with load(several, graph="onnx/model.onnx") as engine:
        manifest = engine.bundle.manifest
    assert not engine.bundle.has_manifest
    assert (manifest.name, manifest.source.architecture) == ("model", "LlamaForCausalLM")
    assert (manifest.model.vocab_size, manifest.model.context_length) == (257, 256)
    assert [(layer.kv_heads, layer.key_size, layer.value_size) for layer in manifest.model.layers if layer] == [
        (1, 4, 4)
    ] * 2
    assert manifest.model.kv.type == "float32"
    assert (manifest.tokens.bos, manifest.tokens.eos) == (256, (256,))
    assert set(manifest.files) == {*TEXTS, "onnx/model.onnx"}


def test_generation_settings_override_the_models(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "model", model="model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 256]}', encoding="utf-8")
    assert open_folder(folder)[0].manifest.tokens.eos == (7, 256)
    (folder / "generation_config.json").unlink()
    assert open_folder(folder)[0].manifest.tokens.eos == (256,)


def test_an_answer_ends_at_the_tokenizers_own_end_too(tmp_path: Path) -> None:
    """Chat models often name the end of a text in the generation configuration, and the end of a turn only in the
    tokenizer."""
    folder = lay_out(tmp_path / "model", model="model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert open_folder(folder)[0].manifest.tokens.eos == (7, 256)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "eos_token": "<nowhere>"}), encoding="utf-8")
    assert open_folder(folder)[0].manifest.tokens.eos == (7,)


def test_the_digest_covers_everything_that_affects_answers(tmp_path: Path) -> None:
    """No answer comes from another model's cache, even if size and time of the file are the same."""
    folder = external(tmp_path / "model")
    weights = folder / "onnx" / "model.onnx_data"
    before, times = open_folder(folder)[0].manifest, weights.stat()
    assert "onnx/model.onnx_data" in before.files
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_folder(folder)[0].manifest.digest != before.digest


def test_two_graphs_of_a_folder_have_two_digests(several: Path) -> None:
    digests = {
        open_folder(several, graph=name)[0].manifest.digest for name in ("onnx/model.onnx", "onnx/model_q8.onnx")
    }
    assert len(digests) == 2


def test_nothing_heavy_is_imported() -> None:
    code = BLOCKER.format(names=set(HEAVY)) + (
        "import edgelm.runtime\n"
        f"with edgelm.runtime.load({str(FIXTURE)!r}, graph='model.onnx') as engine:\n"
        "    print(list(engine.generate('x', max_tokens=24).token_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(EXPECTED[1]["tokens"]), done.stderr


def call(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", folder, EXPECTED[0]["prompt"], "--max-tokens", "24", "--json") == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == EXPECTED[0]["tokens"]


def test_run_with_a_named_graph(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--graph", "onnx/model_q8.onnx", "--max-tokens", "24", "--json")
    assert call("run", several, EXPECTED[1]["prompt"], *arguments) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == EXPECTED[1]["tokens_quantized"]


def test_bench(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", several, "--graph", "onnx/model_q8.onnx", "--context", "32", "--repeats", "1", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert [speed["prompt_tokens"] for speed in figures["speed"]] == [32]
    names = [*(several / name for name in TEXTS), several / "onnx" / "model_q8.onnx"]
    assert figures["bundle_bytes"] == sum(path.stat().st_size for path in names)


def test_inspect_says_that_there_is_no_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "manifest      none" in out and "as they are now" in out
    assert "2 x 1 KV heads of 4" in out and "float32, 64 bytes a token" in out and "LlamaForCausalLM" in out
    assert "parameters" not in out and "made with" not in out
    assert call("inspect", folder, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["has_manifest"] is False
    assert data["digest"] in out


def test_inspect_has_no_report_to_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", folder, "--report") == 1
    assert "report.json" in capsys.readouterr().err


def test_verify_measures_cuts_and_promises_nothing(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", several, "--graph", "onnx/model_q8.onnx") == 0
    out = capsys.readouterr().out
    assert "without a manifest" in out and "as exported" not in out
    assert "does not promise equality" in out


def test_several_files_of_which_none_is_named(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(several)
    for words in (str(several), "onnx/model.onnx, onnx/model_q8.onnx", "--graph onnx/model.onnx", "load(..., graph="):
        assert words in str(caught.value)
    assert call("run", several, "hi") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_either_file_of_a_quantized_pair_names_both(tmp_path: Path) -> None:
    files = {**PAIR, "decoder_model_q8": "decoder_model", "decoder_with_past_model_q8": "model"}
    folder = lay_out(tmp_path / "model", **files)
    with pytest.raises(SettingsError, match=r"decoder_with_past_model_q8\.onnx"):
        open_folder(folder)
    for name in ("decoder_model_q8.onnx", "decoder_with_past_model_q8.onnx"):
        bundle, _ = open_folder(folder, graph=name)
        assert set(bundle.manifest.files) == {*TEXTS, "decoder_model_q8.onnx", "decoder_with_past_model_q8.onnx"}


@pytest.mark.parametrize(
    "graph", ["model.onnx", "onnx/model_q4.onnx", "onnx", "config.json", "../model/onnx/model.onnx", ""]
)
def test_a_name_of_no_graph(several: Path, graph: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_folder(several, graph=graph)
    assert "name one of onnx/model.onnx, onnx/model_q8.onnx" in str(caught.value)


def test_a_graph_of_a_bundle_cannot_be_chosen(tiny_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="one graph"):
        load(tiny_bundle, graph="model.genai.onnx")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_needed_is_missing(tmp_path: Path, name: str) -> None:
    folder = lay_out(tmp_path / "model", model="model")
    (folder / name).unlink()
    with pytest.raises(BundleMissingError) as caught:
        load(folder)
    assert name in str(caught.value) and str(folder) in str(caught.value)


def test_missing_weights(tmp_path: Path) -> None:
    folder = external(tmp_path / "model")
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(EdgelmError, match=r"model\.onnx_data"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("generation_config.json", "null", "not a JSON object"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [1, null, 2.5]}', "eos_token_id"),
    ],
)
def test_a_spoiled_configuration(tmp_path: Path, name: str, text: str, words: str) -> None:
    folder = lay_out(tmp_path / "model", model="model")
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(BundleCorruptError) as caught:
        load(folder)
    assert words in str(caught.value) and name in str(caught.value)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "model", encoder_model="model", decoder_model_merged="decoder_model_merged")
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}', encoding="utf-8")
    with pytest.raises(BundleUnsupportedError) as caught:
        load(folder)
    assert "config.json" in str(caught.value) and "'t5'" in str(caught.value)


def test_a_graph_without_a_cache(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "model", decoder_model="decoder_model")
    with pytest.raises(BundleUnsupportedError) as caught:
        load(folder)
    assert "decoder_model.onnx" in str(caught.value) and "text-generation-with-past" in str(caught.value)


def other_graph(folder: Path, cache: int = TensorProto.FLOAT, **inputs: Sequence[int | str]) -> Path:
    """A graph with other inputs: name=shape. Keys and values have the type `cache`, all else is int64."""
    lay_out(folder)
    taken = [
        helper.make_tensor_value_info(
            name.replace("__", "."), cache if name.startswith("past") else TensorProto.INT64, shape
        )
        for name, shape in inputs.items()
    ]
    node = helper.make_node("Identity", [taken[0].name], ["logits"])
    graph = helper.make_graph(
        [node], "g", taken, [helper.make_tensor_value_info("logits", taken[0].type.tensor_type.elem_type, None)]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "model.onnx"
    )
    return folder


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"inputs_embeds": ["b", "s", 8], "past_key_values__0__key": ["b", 1, "p", 4]}, "inputs_embeds"),
        ({"input_ids": ["b", "s"], "past_conv__0": ["b", 8, 3]}, "past_conv.0"),
        ({"input_ids": ["b", "s"]}, "text-generation-with-past"),
        ({"input_ids": ["b", "s"], "past_key_values__0__decoder__key": ["b", 1, "p", 4]}, "0.decoder.key"),
        ({"input_ids": ["b", "s"], "past_key_values__0__key": ["b", 1, "p", 4]}, "past_key_values.0.value"),
        (
            {
                "input_ids": ["b", "s"],
                "past_key_values__0__key": ["b", 4, "p"],
                "past_key_values__0__value": ["b", "p", 4],
            },
            "(batch, heads, positions, size)",
        ),
        (
            {
                "input_ids": ["b", "s"],
                "past_key_values__0__key": ["b", "heads", "p", 4],
                "past_key_values__0__value": ["b", "heads", "p", 4],
            },
            "numbers",
        ),
    ],
)
def test_a_graph_of_another_kind(tmp_path: Path, inputs: dict[str, Sequence[int | str]], words: str) -> None:
    folder = other_graph(tmp_path / "model", **inputs)
    with pytest.raises(BundleUnsupportedError) as caught:
        load(folder)
    assert words in str(caught.value) and str(folder / "model.onnx") in str(caught.value)


def test_a_cache_of_another_type(tmp_path: Path) -> None:
    shape = ["b", 1, "p", 4]
    inputs = {"input_ids": ["b", "s"], "past_key_values__0__key": shape, "past_key_values__0__value": shape}
    with pytest.raises(BundleUnsupportedError, match="int8"):
        load(other_graph(tmp_path / "model", TensorProto.INT8, **inputs))


@pytest.mark.parametrize("length", [0, 1, 100, 50_000])
def test_a_truncated_graph(tmp_path: Path, length: int) -> None:
    folder = lay_out(tmp_path / "model", model="model")
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(EdgelmError, match=r"model\.onnx"):
        load(folder)


def test_weight_files_are_found_in_every_place(tmp_path: Path) -> None:
    def tensor(location: str) -> TensorProto:
        made = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("offset", "location"), ("location", location), ("length", "4")):
            made.external_data.add(key=key, value=value)
        return made

    inner = helper.make_graph([], "inner", [], [], [tensor("inner.bin")])
    nodes = [
        helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["y"], value=tensor("constant.bin")),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [], [tensor("a.bin"), tensor("é/b.bin"), tensor("a.bin")])
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert weight_files(path) == ["a.bin", "constant.bin", "inner.bin", "é/b.bin"]
    assert weight_files(FIXTURE / "decoder_model_merged.onnx") == []


def test_operators_of_a_graph(tiny_bundle: Path) -> None:
    path = tiny_bundle / "model.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert operators(path) == Counter((node.domain, node.op_type) for node in nodes)


def test_weight_files_of_an_invalid_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    good = (FIXTURE / "model.onnx").read_bytes()
    generator = np.random.default_rng(0)
    for content in (b"\xff" * 5000, generator.bytes(5000), good[:-1], b"\x3a" * 5000, b""):
        path.write_bytes(content)
        with pytest.raises(BundleCorruptError, match=r"model\.onnx"):
            weight_files(path)


@pytest.mark.parametrize(
    "place",
    ["../weights", "/weights", "C:weights", "C:\\weights", "..\\weights", "a\\b", "x/../../w", "\\\\h\\s", "a\x1b[2J"],
)
def test_weights_outside_the_folder_are_refused_before_anything_opens_them(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURE, tmp_path / "model")
    folder = tmp_path / "model"
    for path in folder.glob("*.onnx"):
        path.unlink()
    model = onnx.load(FIXTURE / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / place.replace("/", "_")).write_bytes(bytes(1 << 20))
    monkeypatch.setattr(foreign, "load_graph", lambda *_: pytest.fail("onnxruntime would open them"))
    with pytest.raises(BundleCorruptError, match="is not a file of its folder"):
        foreign.open_foreign(folder, None, 1)
