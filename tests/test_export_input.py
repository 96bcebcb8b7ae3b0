"""`edgelm export` on bad input, a full disk, a kill, an interrupt: one line of error, and no files remain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelm.export.errors import SourceError
from edgelm.export.pipeline import default_output
from edgelm.export.source.finding import find_source, short_name
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.cli import main
from edgelm.runtime.errors import SessionError
from edgelm.runtime.sessions import kernels

from .conftest import WIDE_TARGET, byte_tokenizer, tiny_llama

Refused = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: everything in it was written by the command under test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `edgelm export` with arguments that it must refuse, and check what all refusals have in common.

    Returns the message. A refusal is one line without a traceback, has exit status 1 or 2, and writes nothing.
    """

    def run(*arguments: str | Path, words: tuple[str, ...]) -> str:
        before = contents(here)
        capsys.readouterr()
        status = main(["export", *map(str, arguments)])
        output, errors = capsys.readouterr()
        assert status in (1, 2)
        assert output == ""
        lines = [line for line in errors.splitlines() if not line.startswith("done ")]
        assert len(lines) == 1, errors
        assert lines[0].startswith("edgelm: error: ")
        assert "Traceback" not in errors
        assert "unexpected" not in errors, "the error has no message of its own"
        for word in words:
            assert word in lines[0]
        assert contents(here) == before
        return lines[0]

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, hidden ones included, with the files' bytes."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "spoiled")


def change_config(model: Path, **changes: Any) -> None:
    """Set keys of a model's config.json; None removes a key."""
    path = model / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def test_a_missing_folder(refused: Refused) -> None:
    refused("./no-such-folder", words=("no-such-folder", "neither a folder nor a GGUF", "give a model"))


def test_a_file_in_place_of_a_folder(refused: Refused, model: Path) -> None:
    refused(
        model / "model.safetensors",
        words=("model.safetensors", "neither a folder nor a GGUF file", "give a model folder"),
    )


def test_an_unknown_builtin(refused: Refused) -> None:
    refused("builtin:poems", words=("'poems'", "builtin:tales"))


def test_a_folder_without_config(refused: Refused, model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, words=("config.json", "No such file", "give a folder in Hugging Face's format"))


@pytest.mark.parametrize("text", ["{", "", "not JSON", "[]", '"llama"', "null"])
def test_a_config_that_is_no_json_object(refused: Refused, model: Path, text: str) -> None:
    (model / "config.json").write_text(text, encoding="utf-8")
    refused(model, words=("config.json", "JSON", "download the model again"))


def test_a_config_that_is_no_text(refused: Refused, model: Path) -> None:
    (model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(model, words=("config.json", "download the model again"))


@pytest.mark.parametrize("kind", ["vit", "clip", "bert"])
def test_a_model_that_is_not_causal(refused: Refused, model: Path, kind: str) -> None:
    change_config(model, model_type=kind, architectures=["SomeModel"])
    refused(
        model,
        words=(
            str(model / "config.json"),
            "SomeModel",
            "no causal language model",
            kind,
            "edgelm exports causal models only",
            "ends in ForCausalLM",
        ),
    )


def save_config(folder: Path, config: Any, architecture: str) -> Path:
    """A model folder with only a configuration: refusals based on it must not need weights."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
def test_a_bidirectional_model_that_transformers_can_also_load_as_a_decoder(
    refused: Refused, tmp_path: Path, architecture: str
) -> None:
    """transformers lists bert among the causal models, for bert trained as a decoder. This one was not."""
    import transformers

    folder = tmp_path / "bert"
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    getattr(transformers, architecture)(config).save_pretrained(folder)
    byte_tokenizer(folder)
    refused(folder, words=("no causal language model", "bert"))


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ("T5Config", "T5ForConditionalGeneration"),
        ("BartConfig", "BartForConditionalGeneration"),
        ("WhisperConfig", "WhisperForConditionalGeneration"),
        ("MarianConfig", "MarianMTModel"),
    ],
)
def test_an_encoder_and_a_decoder(refused: Refused, tmp_path: Path, config: str, architecture: str) -> None:
    import transformers

    folder = save_config(tmp_path / "both", getattr(transformers, config)(), architecture)
    refused(
        folder,
        words=(
            str(folder / "config.json"),
            architecture,
            "an encoder and a decoder",
            "edgelm exports causal models only",
            "give one whose architecture ends in ForCausalLM",
        ),
    )


def test_the_decoder_of_an_encoder_decoder_saved_by_itself_is_accepted(tmp_path: Path) -> None:
    import transformers

    from edgelm.export.source.finding import find_source

    config = transformers.BartConfig(vocab_size=257, d_model=16, decoder_layers=1, decoder_ffn_dim=16)
    config.decoder_attention_heads = 2
    transformers.BartForCausalLM(config).save_pretrained(tmp_path)
    assert find_source(str(tmp_path), None) == tmp_path


def test_an_encoder_and_a_decoder_by_its_type_alone(refused: Refused, model: Path) -> None:
    """The configuration does not mention an encoder and names a causal architecture."""
    change_config(model, model_type="t5")
    refused(model, words=(str(model / "config.json"), "'t5'", "an encoder and a decoder"))


@pytest.mark.parametrize(
    ("config", "architecture", "sense"),
    [
        ("LlavaConfig", "LlavaForConditionalGeneration", "vision_config"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration", "vision_config"),
        ("Gemma3nConfig", "Gemma3nForConditionalGeneration", "audio_config"),
        ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration", "audio_config"),
        ("MllamaConfig", "MllamaForCausalLM", "vision_config"),
    ],
)
def test_a_multimodal_model(refused: Refused, tmp_path: Path, config: str, architecture: str, sense: str) -> None:
    """transformers lists some of them among the causal models."""
    import transformers

    folder = save_config(tmp_path / "senses", getattr(transformers, config)(), architecture)
    refused(
        folder,
        words=(
            str(folder / "config.json"),
            architecture,
            "a multimodal model",
            sense,
            "edgelm exports causal models only: give a model of text alone",
        ),
    )


@pytest.mark.parametrize("kind", ["from-the-future", None, ["llama"], 5])
def test_an_unknown_kind_of_model(refused: Refused, model: Path, kind: Any) -> None:
    change_config(model, model_type=kind)
    refused(model, words=("config.json", "model_type", "update"))


def test_a_model_with_code_of_its_own(refused: Refused, model: Path, here: Path) -> None:
    code = "import pathlib\npathlib.Path('executed').touch()\n"
    (model / "modeling_own.py").write_text(code, encoding="utf-8")
    change_config(model, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    refused(model, words=("code of its own", "modeling_own.Own", "never runs"))
    assert not (here / "executed").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights(refused: Refused, model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).touch()
    refused(model, words=(name, "pickle", "safetensors", "save_pretrained"))


def test_no_weights_at_all(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, words=("no *.safetensors", "give a folder with weights"))


def test_truncated_weights(refused: Refused, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(model, words=("spoiled", "cannot be loaded"))


def change_weights(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_weight(refused: Refused, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(model, lambda weights: weights.pop(name))
    refused(model, words=("spoiled", name, "download the model again"))


def test_a_weight_of_another_shape(refused: Refused, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(model, lambda weights: weights.update({name: weights[name][:, :-1].contiguous()}))
    refused(model, words=("spoiled", name))


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias"], "attention_bias or mlp_bias"),
        (["model.layers.0.mlp.up_proj.weight_scale_inv"], "add its quantization_config"),
        (["model.layers.2.mlp.up_proj.weight"], "correct config.json"),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], "merge it into the model"),
        (["v_head.summary.weight"], "correct config.json"),
    ],
)
def test_weights_that_the_model_does_not_use(refused: Refused, model: Path, names: list[str], advice: str) -> None:
    """torch ignores them too, so no comparison with torch can find them."""
    import torch

    change_weights(model, lambda weights: weights.update({name: torch.ones(96) for name in names}))
    refused(model, words=("spoiled", f"does not use {len(names)} of its weights", *names, advice))


def test_many_weights_that_the_model_does_not_use_are_counted(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    byte_tokenizer(folder)
    change_config(folder, num_hidden_layers=2)
    refused(folder, words=("does not use 9 of its weights", "model.layers.2.input_layernorm.weight", "..."))


def test_what_a_model_computes_from_its_configuration_is_no_unused_weight(tmp_path: Path) -> None:
    """Older versions of transformers saved masks and rotary tables with the weights, and many hub models have them."""
    import torch

    from edgelm.export.source.finding import find_source
    from edgelm.export.source.loading import load_module

    from .model_zoo import tiny_model

    computed = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril().to(torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.attn.rotary_emb.inv_freq": torch.ones(3),
    }
    tiny_model("gptj").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update(computed))
    load_module(find_source(str(tmp_path), None))


def test_a_weight_that_is_only_shaped_like_a_mask_is_refused(refused: Refused, model: Path) -> None:
    import torch

    name = "model.layers.0.self_attn.bias"
    change_weights(model, lambda weights: weights.update({name: torch.full((1, 1, 8, 8), 0.5)}))
    refused(model, words=("does not use 1 of its weights", name))


def quantize_to_fp8(folder: Path, block: int) -> None:
    """Store the matrices of a model's layers as FP8 with a scale per block, as released models do."""
    import torch

    def quantize(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            rows, columns = weights[name].shape
            blocks = weights[name].reshape(rows // block, block, columns // block, block)
            scales = blocks.abs().amax((1, 3)) / 448
            values = (blocks / scales[:, None, :, None]).reshape(rows, columns)
            weights.update({name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales})

    change_weights(folder, quantize)
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    change_config(folder, quantization_config={**settings, "weight_block_size": [block, block]})


def test_fp8_weights_with_scales_of_blocks_are_widened(here: Path, model: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    from edgelm.export.source.finding import find_source
    from edgelm.export.source.loading import load_module
    from edgelm.runtime import load

    quantize_to_fp8(model, 32)
    name = "model.layers.1.mlp.down_proj.weight"
    stored = load_file(model / "model.safetensors")
    blocks = stored[name].float().reshape(2, 32, 3, 32) * stored[f"{name}_scale_inv"][:, None, :, None]
    widened = load_module(find_source(str(model), None))
    assert torch.equal(widened.get_parameter(name), blocks.reshape(64, 96))

    assert main(["export", str(model), "--scheme", "fp32", "--out", "bundle"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = list(b"Once upon a time")
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    with load("bundle", response_cache=False, prefix_cache=False) as engine:
        assert list(engine.generate(token_ids=prompt, max_tokens=16).token_ids) == expected.tolist()


def test_fp8_weights_whose_scales_would_be_left_out(refused: Refused, model: Path) -> None:
    quantize_to_fp8(model, 32)
    change_config(model, quantization_config=None)
    refused(model, words=("does not use 14 of its weights", "_scale_inv", "add its quantization_config"))


def test_fp8_blocks_that_do_not_fit_a_matrix(refused: Refused, model: Path) -> None:
    """64 rows are a block of 48 and a rest of 16; transformers would split them into two halves."""
    quantize_to_fp8(model, 32)
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    change_config(model, quantization_config={**settings, "weight_block_size": [48, 32]})
    refused(model, words=("is not a whole number of FP8 blocks of 48 x 32", "export the model that it was made from"))


@pytest.mark.parametrize(
    "change",
    [{"weight_block_size": None}, {"weight_block_size": [0]}, {"fmt": "e5m2"}, {"activation_scheme": "static"}],
)
def test_fp8_weights_in_another_form(refused: Refused, model: Path, change: dict[str, Any]) -> None:
    quantize_to_fp8(model, 32)
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    change_config(model, quantization_config={**settings, **change})
    refused(model, words=("FP8 weights in another form", next(iter(change)), "export the model that it was made from"))


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "of-tomorrow"}}, "of-tomorrow"),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, "bits, group_size"),
        ({"text_config": {"quantization_config": {"quant_method": "torchao"}}}, "torchao"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "MLX"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    ],
)
def test_weights_that_are_quantized_already(
    refused: Refused, model: Path, changes: dict[str, Any], method: str
) -> None:
    change_config(model, **changes)
    refused(model, words=("spoiled", "quantized already", method, "export the model that it was made from"))


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_weights_that_a_file_beside_them_calls_quantized(refused: Refused, model: Path, name: str, method: str) -> None:
    (model / name).write_text('{"bits": 4}', encoding="utf-8")
    refused(model, words=("spoiled", "quantized already", method, "export the model that it was made from"))


def test_no_tokenizer(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    refused(model, words=("spoiled", "tokenizer", "tokenizer.json"))


def test_a_spoiled_tokenizer(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").write_text("{", encoding="utf-8")
    refused(model, words=("spoiled", "tokenizer", "tokenizer.json"))


def test_a_tokenizer_with_more_tokens_than_the_model(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    tiny_llama(vocab_size=60, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    byte_tokenizer(folder)
    refused(
        folder,
        words=(str(folder), "the tokenizer gives id 256", "0 to 59", "give the tokenizer that belongs to the model"),
    )


def test_a_tokenizer_with_one_token_too_many_that_the_text_does_not_use(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    tiny_llama(vocab_size=256, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    byte_tokenizer(folder)
    refused(folder, words=(str(folder), "gives id 256", "0 to 255", "give the tokenizer that belongs to the model"))


def test_a_token_for_padding_that_the_model_has_no_row_for(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was added for training. transformers answers every prompt without it."""
    import transformers

    from edgelm.runtime import load
    from edgelm.runtime.errors import PromptError

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id == 257
    assert main(["export", str(model), "--out", "bundle", "--scheme", "fp32"]) == 0
    assert "prompts that hold '[PAD]' are refused" in capsys.readouterr().out
    with load("bundle", response_cache=False, prefix_cache=False) as engine:
        assert engine.generate("Once [PAT]", max_tokens=2).token_ids
        assert set(engine.generate("Once", regex="[ab]{3}").text) <= {"a", "b"}
        with pytest.raises(PromptError, match=r"holds '\[PAD\]', a token for which the model has no row"):
            engine.generate("Once [PAD]", max_tokens=2)


def test_a_token_without_a_row_that_the_template_writes(refused: Refused, model: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    refused(model, words=("gives id 257", "0 to 256", "give the tokenizer that belongs to the model"))


def test_a_model_with_more_rows_than_the_tokenizer_has_tokens(here: Path, tmp_path: Path) -> None:
    """Valid: rows are often padded to a round number."""
    folder = tmp_path / "padded"
    tiny_llama(vocab_size=320).save_pretrained(folder)
    byte_tokenizer(folder)
    assert main(["export", str(folder), "--target", WIDE_TARGET, "--out", "bundle"]) == 0
    assert Bundle.open(Path("bundle")).manifest.model.vocab_size == 320


def test_a_pointer_of_git_lfs_in_place_of_weights(refused: Refused, model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"
    (model / "model.safetensors").write_text(pointer, encoding="utf-8")
    refused(model, words=("model.safetensors", "pointer of Git LFS", "git lfs pull"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_a_number(refused: Refused, model: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(weights: dict[str, Any]) -> None:
        weights[name][3, 5] = value

    change_weights(model, spoil)
    refused(
        model,
        words=(
            str(model / "model.safetensors"),
            f"1 of the {64 * 96} values of {name}",
            "NaN",
            "download the model again",
        ),
    )


def test_a_weight_that_is_not_a_number_in_one_of_several_files(refused: Refused, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "sharded"
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    broken.save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer(folder)
    files = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert len(set(files.values())) > 1
    refused(folder, words=(str(folder / files["model.norm.weight"]), "model.norm.weight", "download the model again"))


def test_a_model_without_an_end_token(here: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Valid, but its answers never end by themselves, so a note says so."""
    change_config(model, eos_token_id=None)
    change_tokenizer(model, eos_token=None)
    (model / "generation_config.json").unlink()
    assert main(["export", str(model), "--out", "bundle", "--scheme", "fp32"]) == 0
    assert Bundle.open(Path("bundle")).manifest.tokens.eos == ()
    (record,) = [record for record in caplog.records if record.name.startswith("edgelm.")]
    assert record.levelname == "WARNING"
    assert "eos_token_id" in record.getMessage()
    assert str(model) in record.getMessage()


def change_tokenizer(model: Path, **changes: Any) -> None:
    """Set keys of a model's tokenizer_config.json; None removes a key."""
    path = model / "tokenizer_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def test_an_answer_ends_at_the_tokenizers_own_end_too(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In chat models it ends a turn, and the generation configuration may name only the end of a text."""
    (model / "generation_config.json").write_text('{"eos_token_id": 65}', encoding="utf-8")
    assert main(["export", str(model), "--out", "bundle", "--scheme", "fp32"]) == 0
    said = "answers end at the tokenizer's end token '<end>' too, where the generation configuration names"
    assert said in capsys.readouterr().out
    manifest = Bundle.open(Path("bundle")).manifest
    assert manifest.tokens.eos == (65, 256)
    (note,) = manifest.notes
    assert note.startswith(said)
    assert json.loads(Path("bundle/report.json").read_text(encoding="utf-8"))["notes"] == [note]
    assert f"Note: {said[:20]}" in Path("bundle/report.html").read_text(encoding="utf-8")
    assert main(["inspect", "bundle"]) == 0
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("name", [None, "<end>"])
def test_no_note_if_the_tokenizers_end_is_known_or_missing(model: Path, name: str | None) -> None:
    from edgelm.export.source.loading import describe_source, load_module

    change_tokenizer(model, eos_token=name)
    source = describe_source("tiny", model, load_module(model))
    assert (source.tokens.eos, source.notes) == ((256,), ())


@pytest.mark.parametrize(
    ("template", "said"), [(None, 'edgelm run bundle "Once upon a time"'), ("{{ messages }}", "edgelm chat bundle")]
)
def test_the_last_line_suggests_the_next_command(
    here: Path, model: Path, template: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tokenizer(model, chat_template=template)
    assert main(["export", str(model), "--out", "bundle", "--scheme", "fp32"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Wrote bundle. Try:  {said}"


def test_an_unknown_target(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--target", "x86_cpu", words=("unknown target 'x86_cpu'", "did you mean x86-cpu?"))


def test_a_target_file_that_is_not_there(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--target", "mine.toml", words=("unknown target 'mine.toml'", "x86-cpu"))


def test_a_target_file_with_a_mistake(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("shceme = 'fp32'\n", encoding="utf-8")
    refused(tiny_model, "--target", tmp_path / "mine.toml", words=("mine.toml", "shceme", "did you mean scheme?"))


def test_a_provider_that_is_not_installed(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    from edgelm.targets import profile

    text = (Path(profile.__file__).parent / "x86-cpu.toml").read_text(encoding="utf-8")
    changed = text.replace('"CPUExecutionProvider"', '"ToasterExecutionProvider"')
    (tmp_path / "toaster.toml").write_text(changed, encoding="utf-8")
    arguments = ("--target", tmp_path / "toaster.toml")
    refused(tiny_model, *arguments, words=("no ToasterExecutionProvider", "install"))


def test_an_unknown_scheme(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--scheme", "int4", words=("unknown scheme 'int4'", "int8-rowwise", "fp32"))


def test_an_unknown_kv_type(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--kv", "fp8", words=("unknown kv 'fp8'", "int8", "float32"))


def test_a_machine_that_no_target_fits(refused: Refused, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    refused(tiny_model, words=("no target fits this machine", "--target"))


def test_a_missing_text(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--text", "no.txt", words=("no.txt", "No such file", "give a text file"))


def test_a_folder_as_text(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--text", tiny_model, words=(str(tiny_model), "directory", "give a text file"))


def test_a_text_that_is_not_utf8(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Käse und Brötchen".encode("latin-1"))
    refused(tiny_model, "--text", tmp_path / "latin.txt", words=("latin.txt", "not UTF-8", "byte 1", "convert"))


@pytest.mark.parametrize(
    ("text", "left"),
    [("", 0), ("Too short.", 6), (2000 * "x", 0), (511 * "x" + " " + 511 * "y", 511)],
    ids=["empty", "short", "one word", "one token short of a window"],
)
def test_a_text_that_is_too_short(refused: Refused, tiny_model: Path, tmp_path: Path, text: str, left: int) -> None:
    """Half of the text judges, and it must fill a window."""
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    words = ("short.txt", f"has {left} tokens, 512 are needed", "1024 tokens or more")
    refused(tiny_model, "--text", tmp_path / "short.txt", words=words)


def test_a_text_of_two_windows_is_enough(tiny_model: Path, here: Path) -> None:
    (here / "text.txt").write_text(512 * "x" + " " + 512 * "y", encoding="ascii")
    assert main(["export", str(tiny_model), "--text", "text.txt", "--out", "bundle", "--scheme", "fp32"]) == 0


def test_a_revision_of_a_local_folder(refused: Refused, tiny_model: Path) -> None:
    refused(tiny_model, "--revision", "main", words=("revision", str(tiny_model), "leave --revision out"))


def test_a_revision_of_a_builtin_model(refused: Refused) -> None:
    refused("builtin:tales", "--revision", "main", words=("revision", "builtin:tales", "leave --revision out"))


def test_a_hub_id_without_a_network(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """conftest sets HF_HUB_OFFLINE, so no request is sent."""
    refused("nobody/no-such-model", words=("nobody/no-such-model", "cannot be fetched", "check the name"))


def test_an_output_that_is_a_file(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "out").write_text("precious", encoding="utf-8")
    refused(tiny_model, "--out", "out", words=("out exists", "--out"))
    refused(tiny_model, "--out", "out", "--force", words=("out exists", "has no manifest.json", "--out"))


def test_an_output_that_is_a_folder_with_other_things(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    refused(tiny_model, "--out", "out", words=("out exists", "--out"))
    refused(tiny_model, "--out", "out", "--force", words=("out exists", "has no manifest.json", "--out"))


def test_an_output_that_is_a_dangling_link(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "out").symlink_to(here / "nowhere")
    refused(tiny_model, "--out", "out", words=("out exists", "--out"))
    refused(tiny_model, "--out", "out", "--force", words=("out exists", "--out"))


def test_an_output_that_is_a_bundle_needs_force(
    refused: Refused, tiny_model: Path, tiny_bundle: Path, here: Path
) -> None:
    shutil.copytree(tiny_bundle, here / "out")
    refused(tiny_model, "--out", "out", words=("out exists", "--force"))


def test_a_refused_export_does_not_touch_the_bundle_that_force_would_replace(
    refused: Refused, model: Path, tiny_bundle: Path, here: Path
) -> None:
    shutil.copytree(tiny_bundle, here / "out")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    refused(model, "--out", "out", "--force", words=("tokenizer.json",))


def test_an_output_below_a_file(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "file").touch()
    refused(tiny_model, "--out", "file/out", words=("file/out", "cannot be written", "--out"))


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "--sheme", "fp32"), ("a", "--out")])
def test_wrong_usage(here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.splitlines()[-1].startswith("edgelm export: error: ")
    assert not contents(here)


def test_force_replaces_a_bundle(tiny_model: Path, tiny_bundle: Path, here: Path) -> None:
    shutil.copytree(tiny_bundle, here / "out")
    (here / "out" / "notes.txt").write_text("of the old bundle", encoding="utf-8")
    assert main(["export", str(tiny_model), "--target", "x86-cpu", "--scheme", "fp32", "--out", "out", "--force"]) == 0
    bundle = Bundle.open(here / "out")
    assert bundle.manifest.quantization.scheme == "fp32"
    bundle.check_files(bundle.manifest.files)
    assert [path.name for path in here.iterdir()] == ["out"]
    assert {path.name for path in (here / "out").iterdir()} == {*bundle.manifest.files, "manifest.json"}


# An export in a process of its own, which can be limited and killed. {before} runs before the export.
PROGRAM = """
import os, resource, sys
{before}
from edgelm.runtime.cli import main
from edgelm.runtime.errors import SessionError
from edgelm.runtime.sessions import kernels
sys.exit(main(sys.argv[1:]))
"""


def start(here: Path, model: Path, before: str = "") -> subprocess.Popen[str]:
    """Start an export to here/out in a process of its own."""
    arguments = ["export", str(model), "--target", "x86-cpu", "--scheme", "fp32", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before), *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def wait_for_partial(here: Path, process: subprocess.Popen[str]) -> Path:
    """Wait until the export has written something into its scratch folder."""
    while process.poll() is None:
        for folder in here.glob(".out.partial-*"):
            if any(path.is_file() and path.name != "lock" for path in folder.rglob("*")):
                return folder
        time.sleep(0.01)
    raise AssertionError(f"the export ended by itself: {process.communicate()}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk(here: Path, tiny_model: Path) -> None:
    # A file size limit simulates a full disk. The tokenizer fits, the weights do not.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    output, errors = start(here, tiny_model, limit).communicate(timeout=600)
    assert output == ""
    lines = [line for line in errors.splitlines() if not line.startswith("done ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("edgelm: error: no room to write out")
    assert "free some space" in lines[0]
    assert not contents(here)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_kill_leaves_nothing_visible_and_the_next_export_cleans_up(here: Path, tiny_model: Path) -> None:
    process = start(here, tiny_model)
    partial = wait_for_partial(here, process)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in here.iterdir()] == [partial.name]
    assert not list(here.rglob("manifest.json"))
    # Everything else stays: names that only look similar, and the folder of an export that still runs.
    bystanders = [here / ".out.partial-", here / ".out.partial-notes", here / f".out.partial-{os.getppid()}"]
    bystanders += [here / ".other.partial-99999999"]
    for folder in bystanders:
        folder.mkdir()
    assert main(["export", str(tiny_model), "--target", "x86-cpu", "--scheme", "fp32", "--out", "out"]) == 0
    assert sorted(here.iterdir()) == sorted([here / "out", *bystanders])
    bundle = Bundle.open(here / "out")
    bundle.check_files(bundle.manifest.files)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_leaves_nothing(here: Path, tiny_model: Path) -> None:
    process = start(here, tiny_model)
    wait_for_partial(here, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert output == ""
    lines = [line for line in errors.splitlines() if not line.startswith("done ")]
    assert lines == ["edgelm: interrupted"]
    assert not contents(here)


# ---- names of folders, and folders that are no model


def test_an_adapter_alone_is_named_with_its_base(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    for text, base in (('{"base_model_name_or_path": "owner/base"}', "owner/base"), ("[", "another model")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SourceError, match=f"adapter .LoRA. for {base}.*merge"):
            find_source(str(tmp_path), None)


def test_a_folder_is_called_by_its_own_name_and_a_snapshot_by_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--Tiny-1B" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    assert short_name(str(snapshot)) == short_name(f"{snapshot}/") == "Tiny-1B"
    monkeypatch.chdir(snapshot)
    assert short_name(".") == "Tiny-1B"
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert short_name(".") == short_name("./") == short_name("../model") == "model"
    assert short_name("..") == tmp_path.name and short_name("owner/name") == "name"


def test_a_bundle_is_not_written_into_its_model_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(".", Path(), "x86-cpu") == tmp_path / "model-x86-cpu"
    monkeypatch.chdir(tmp_path)
    assert default_output("model", Path("model"), "x86-cpu") == Path("model-x86-cpu")


@pytest.mark.parametrize("sizes", [[], ["--sizes"]])
def test_kernels_that_cannot_be_used_are_refused_before_the_work(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[str]
) -> None:
    def mismatch() -> str | None:
        raise SessionError("edgelm-kernels belongs to another version of edgelm")

    monkeypatch.setattr(kernels, "identity", mismatch)
    line = refused("builtin:tales", *sizes, words=("another version",))
    assert "cannot be exported" not in line


@pytest.mark.parametrize("command", ["export", "compress"])
def test_a_bundle_is_no_model(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["--recipe", "light"] if command == "compress" else []
    assert main([command, str(tiny_bundle), "--out", str(tmp_path / "out"), *more]) == 1
    assert f"{tiny_bundle} is a bundle: give the model that it was exported from" in capsys.readouterr().err
