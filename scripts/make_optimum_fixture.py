"""Make tests/fixtures/optimum: a tiny random Llama, exported by optimum in the published forms.

Run by scripts/make_optimum_fixture, which makes its environment. All files are rewritten:

    model.onnx               `optimum-cli export onnx --task text-generation-with-past`: one graph that takes the past
    model_quantized.onnx     the same after onnxruntime's dynamic quantization, as optimum does it
    decoder_model.onnx       the older form: a graph for the first step, and one for the others, which is model.onnx
                             byte for byte. Current optimum no longer writes it, but its classes can.
    decoder_model_merged.onnx
                             both in one, by optimum's merge_decoders, with the input use_cache_branch
    expected.json            prompts and the greedy tokens after each: from transformers, and from optimum's own runtime
                             with the quantized graph
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from optimum.exporters.onnx import export, main_export
from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
from optimum.onnx import merge_decoders
from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parents[1] / "tests" / "fixtures" / "optimum"
NEW_TOKENS = 24
PROMPTS = ["Once upon a time", "x", "The cat sat on the mat, and the dog sat on the cat. " * 4]
GRAPHS = ("model.onnx", "model_quantized.onnx", "decoder_model.onnx", "decoder_model_merged.onnx")
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def make_model(folder: Path) -> LlamaForCausalLM:
    """A Llama of two layers with logits far apart, and a byte tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    return model


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    """The tokens that a model generates after a prompt."""
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return list(tokens[0, ids.shape[1] :].tolist())


def expected(model: LlamaForCausalLM, made: Path) -> list[dict[str, Any]]:
    """Each prompt with its ids and the greedy tokens after it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
    quantized = ORTModelForCausalLM.from_pretrained(made, file_name="model_quantized.onnx")
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = {"tokens": greedy(model, ids), "tokens_quantized": greedy(quantized, ids)}
        found.append({"prompt": prompt, "prompt_ids": ids[0].tolist(), **tokens})
    return found


def export_older_form(model: LlamaForCausalLM, folder: Path) -> None:
    """decoder_model.onnx, decoder_with_past_model.onnx and both in one."""
    first = LlamaOnnxConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=False)
    later = LlamaOnnxConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)
    paths = [folder / "decoder_model.onnx", folder / "decoder_with_past_model.onnx"]
    for config, path in zip((first, later), paths, strict=True):
        export(model, config, path)
    merge_decoders(*paths, save_path=folder / "decoder_model_merged.onnx")


def strip(graph: onnx.GraphProto) -> None:
    """Remove debugging data: half of a small file."""
    del graph.value_info[:]
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                strip(attribute.g)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        source, made = Path(temporary) / "source", Path(temporary) / "made"
        model = make_model(source)
        main_export(str(source), made, task="text-generation-with-past", library_name="transformers")
        dynamic = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(made, file_name="model.onnx").quantize(dynamic, save_dir=made)
        export_older_form(model, made)
        assert (made / "model.onnx").read_bytes() == (made / "decoder_with_past_model.onnx").read_bytes()
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        for name in GRAPHS:
            graph = onnx.load(made / name)
            strip(graph.graph)
            onnx.save(graph, OUT / name)
        for name in TEXTS:
            shutil.copyfile(made / name, OUT / name)
        (OUT / "expected.json").write_text(json.dumps(expected(model, made)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
