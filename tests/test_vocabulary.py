"""`trim-vocabulary`: a tokenizer with fewer tokens, the rows that belong to it, and figures that stay comparable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgelm.export import ExportConfig, export_model
from edgelm.export.compress.reading import Reader
from edgelm.export.compress.vocabulary.tokenizer import trim_tokenizer
from edgelm.export.compress.vocabulary.trimmed import InRemaining, Trimmed, keep_rows
from edgelm.export.errors import RecipeError
from edgelm.export.source.loading import load_module
from edgelm.export.source.tokenizer import load_tokenizer
from edgelm.runtime import load

from .conftest import TEXT, shared, tiny_llama
from .test_compress_run import Listener, compress, refused

WORDS = 512  # tokens of the tokenizer below, before the end token
TRIM: dict[str, Any] = {"use": "trim-vocabulary", "ratio": 0.1}


def word_tokenizer(folder: Path) -> None:
    """Write a byte-pair tokenizer of 512 tokens made from TEXT, and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    texts = [TEXT, Path(__file__).read_text(encoding="utf-8")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"backend": "tokenizers", "eos_token": "<end>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def worded_llama(**changes: Any) -> Any:
    """A tiny model with three more rows than `word_tokenizer` has tokens."""
    return tiny_llama(**{"vocab_size": WORDS + 4, "bos_token_id": None, "eos_token_id": WORDS, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `worded_llama` and `word_tokenizer`."""
    folder = tmp_path_factory.mktemp("words") / "m"
    word_tokenizer(folder)
    worded_llama().save_pretrained(folder)
    return folder


def trim(folder: Path, module: Any, rows: int, text: str = "") -> tuple[Any, Trimmed]:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer, trim_tokenizer(tokenizer, module, rows, ids)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "qwen2", "phi-3-mini", "smollm2"])
def test_real_tokenizers_keep_what_they_can_write(name: str) -> None:
    folder = shared(f"tokenizers/{name}")
    text = "Once upon a time, there was a lighthouse keeper."
    size = len(load_tokenizer(folder)) + 100
    whole, trimmed = trim(folder, tiny_llama(vocab_size=size, hidden_size=16, eos_token_id=0), size // 2, text)
    smaller: Any = trimmed.tokenizer
    assert len(trimmed.kept) <= -(-(size // 2) // 64) * 64
    assert len(trimmed.kept) > size // 2 - 64
    old = whole.convert_ids_to_tokens([index for index in trimmed.kept if index < len(whole)])
    assert smaller.convert_ids_to_tokens(list(range(len(old)))) == old
    assert smaller.all_special_tokens == whole.all_special_tokens
    assert smaller.decode(smaller(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])
    ids = whole(text, add_special_tokens=False)["input_ids"]
    assert trimmed.split(ids) == smaller(text, add_special_tokens=False)["input_ids"]
    assert len(trimmed.split(ids)) == len(ids), "tokens of the text that was given stay"
    for token, parts in enumerate(trimmed.parts[: len(whole)]):
        assert "".join(smaller.convert_ids_to_tokens(list(parts))) == whole.convert_ids_to_tokens(token)


@given(text=st.text(max_size=60))
def test_no_text_becomes_impossible(text: str, model: Path) -> None:
    whole, trimmed = trim(model, worded_llama(), 320)
    ids = trimmed.tokenizer(text, add_special_tokens=False)["input_ids"]
    split = trimmed.split(whole(text, add_special_tokens=False)["input_ids"])
    assert trimmed.tokenizer.decode(ids) == trimmed.tokenizer.decode(split) == text


@pytest.mark.parametrize("tied", [True, False])
def test_kept_rows_answer_as_before(model: Path, tied: bool) -> None:
    module, whole = (worded_llama(tie_word_embeddings=tied) for _ in range(2))
    _, trimmed = trim(model, module, 384, "the end")
    keep_rows(module, trimmed)
    ids = torch.tensor([trimmed.tokenizer("the end of the text")["input_ids"]])
    kept = torch.tensor(trimmed.kept)
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, whole(kept[ids]).logits[..., kept])
    assert module.config.vocab_size == len(kept) == 384
    assert module.config.eos_token_id == trimmed.tokenizer.convert_tokens_to_ids("<end>") == trimmed.kept.index(WORDS)
    assert module.generation_config.eos_token_id == module.config.eos_token_id
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied


def test_ids_without_a_row_stay_without_one(model: Path, tmp_path: Path) -> None:
    """Llama's padding of -1, and a token that was added to the tokenizer alone."""
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<behind>"])
    module = worded_llama(vocab_size=WORDS + 1, pad_token_id=None)
    module.config.pad_token_id = -1
    assert tokenizer.convert_tokens_to_ids("<behind>") == WORDS + 1
    trimmed = trim_tokenizer(tokenizer, module, 384, [])
    keep_rows(module, trimmed)
    assert module.config.pad_token_id == -1
    assert module.config.vocab_size == len(trimmed.kept) == trimmed.tokenizer.convert_tokens_to_ids("<behind>")


def test_a_head_with_a_bias_keeps_its_rows(model: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PhiConfig(vocab_size=WORDS + 1, bos_token_id=None, eos_token_id=WORDS, **sizes)
    module = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(module.lm_head.bias)
    _, trimmed = trim(model, module, 384)
    expected = module.lm_head.bias.detach()[torch.tensor(trimmed.kept)]
    keep_rows(module, trimmed)
    assert torch.equal(module.lm_head.bias, expected)


def test_a_model_that_uses_token_ids_elsewhere_is_refused(model: Path) -> None:
    class Elsewhere(type(worded_llama())):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **others: Any) -> Any:
            result = super().forward(input_ids=input_ids, **others)
            result.logits = result.logits * input_ids.float().mean()
            return result

    module = worded_llama()
    module.__class__ = Elsewhere
    _, trimmed = trim(model, module, 384)
    with pytest.raises(RecipeError, match="Elsewhere uses token ids outside"):
        keep_rows(module, trimmed)


def test_figures_are_per_token_of_the_source(model: Path) -> None:
    """The loss of a split text by hand, and a divergence of 0 where nothing is removed."""
    whole, module = worded_llama(), worded_llama()
    tokenizer, trimmed = trim(model, module, 320)
    ids = tokenizer(TEXT)["input_ids"][:100]
    reader = Reader(ids, 512, trimmed)
    source = reader.read(whole)
    keep_rows(module, trimmed)
    reading = reader.read(module, split=True)
    split = torch.tensor([trimmed.split(ids)])
    first = len(trimmed.parts[ids[0]])
    with torch.no_grad():
        says = torch.log_softmax(module(split).logits[0], -1)
    loss = -says[first - 1 : -1].gather(1, split[0, first:, None]).sum() / 99
    assert math.isclose(reading.loss, loss, rel_tol=1e-5)
    assert len(split[0]) > 100
    assert reading.kl > 0
    assert reading.loss > source.loss
    whole, module = worded_llama(vocab_size=WORDS + 1), worded_llama(vocab_size=WORDS + 1)
    everything = Trimmed(trimmed.tokenizer, tuple(range(WORDS + 1)), tuple((token,) for token in range(WORDS + 1)))
    again = Reader(ids, 512, everything)
    source = again.read(whole)
    keep_rows(module, everything)
    reading = again.read(module, split=True)
    assert math.isclose(reading.loss, source.loss, rel_tol=1e-5)
    assert reading.kl < 1e-4
    assert reading.same == 1


def test_the_divergence_is_zero_where_first_parts_take_the_removed_probability(model: Path) -> None:
    """A reference that never predicts a removed token loses nothing where its tokens begin."""
    whole, module = worded_llama(tie_word_embeddings=False), worded_llama(tie_word_embeddings=False)
    tokenizer, trimmed = trim(model, module, 320)
    removed = [index for index in range(WORDS + 4) if index not in trimmed.kept]
    for each in (whole, module):
        bias = torch.zeros(WORDS + 4)
        bias[removed] = -1e4
        each.lm_head.bias = torch.nn.Parameter(bias)
    ids = [trimmed.kept[index] for index in trimmed.split(tokenizer(TEXT)["input_ids"][:100])]
    reader = Reader(ids, 512, trimmed)
    reader.read(whole)
    keep_rows(module, trimmed)
    reading = reader.read(module, split=True)
    assert reading.kl < 1e-4
    assert reading.same == 1


def test_windows_fit_a_short_context_in_parts(model: Path) -> None:
    module = worded_llama(max_position_embeddings=32)
    tokenizer, trimmed = trim(model, module, 320)
    ids = tokenizer(TEXT)["input_ids"][:100]
    assert len(trimmed.split(ids[:32])) > 32
    reader = Reader(ids, 32, trimmed)
    lengths: list[int] = []
    reader.read(module)
    keep_rows(module, trimmed)
    module.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    reader.read(module, split=True)
    assert max(lengths) <= 32


def test_the_folder_answers_as_its_bundle_and_transformers(model: Path, tmp_path: Path) -> None:
    """Trim, remove a layer, heal against the source's predictions, export: one path, and a plain folder for
    transformers if nothing but the vocabulary changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training = {"use": "distil", "steps": 2, "batch": 2, "length": 16, "learning_rate": 1e-3, "own_text": 64}
    record, _ = compress(model, tmp_path / "healed", TRIM, {"use": "drop-layers", "last": 1}, training)
    before, after = record.steps[0]["before"], record.steps[0]["after"]
    assert 0.08 < 1 - after["parameters"] / before["parameters"] <= 0.1
    assert record.steps[0]["details"]["rows"][0] == WORDS + 4
    assert after["perplexity"] > 0
    assert after["kl"] > 0
    assert record.steps[2]["training"]["curve"][0]["kl"] > 0
    compress(model, tmp_path / "trimmed", TRIM)
    settings: dict[str, Any] = {"target": "x86-cpu", "scheme": "fp32"}
    export_model(ExportConfig(str(tmp_path / "trimmed"), out=tmp_path / "bundle", **settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "trimmed")
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    expected = plain.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    with load(tmp_path / "bundle") as engine:
        assert engine.generate("Once upon", max_tokens=12, min_tokens=12).token_ids == tuple(expected.tolist())
    once, _ = compress(tmp_path / "trimmed", tmp_path / "twice", {**TRIM, "ratio": 0.06})
    assert once.steps[1]["details"]["rows"][0] == record.steps[0]["details"]["rows"][1]


def test_a_compressed_bundle_is_the_recipes_bundle(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "trim.toml"
    compress(model, tmp_path / "folder", TRIM)
    recipe.write_text('[[step]]\nuse = "trim-vocabulary"\nratio = 0.1\n', encoding="utf-8")
    for name, source, extra in (
        ("one", tmp_path / "folder", {}),
        ("other", model, {"compress": str(recipe)}),
    ):
        export_model(ExportConfig(str(source), out=tmp_path / name, target="x86-cpu", scheme="fp32", **extra))
    for name in ("tokenizer.json", "model.onnx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{**TRIM, "ratio": 0.9}], "has 257 tokens that cannot be removed, and the ratio leaves 0"),
        ([{"use": "drop-layers", "last": 1}, TRIM], "step 2, trim-vocabulary: must be the first step"),
        ([TRIM, TRIM], "step 2, trim-vocabulary: must be the first step"),
    ],
)
def test_what_cannot_be_trimmed_is_refused_before_any_work(
    model: Path, tmp_path: Path, steps: list[dict[str, Any]], words: str
) -> None:
    assert words in refused(model, tmp_path / "out", *steps)


def test_a_ratio_below_one_row_is_refused(model: Path) -> None:
    with pytest.raises(RecipeError, match="removes none of 513 rows"):
        trim(model, worded_llama(vocab_size=WORDS + 1), WORDS + 1)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    word_tokenizer(folder)
    pieces = [("<unk>", 0.0), *((chr(code), -1.0) for code in range(32, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tiny_llama(vocab_size=97, bos_token_id=None, eos_token_id=96).save_pretrained(folder)
    assert "of the kind Unigram" in refused(folder, tmp_path / "out", TRIM)
    assert load_module(folder).config.vocab_size == 97


def test_a_rehearsal_trims_in_memory(model: Path, tmp_path: Path) -> None:
    from edgelm.export.compress.run import rehearse

    record, listener = compress(model, tmp_path / "out", TRIM, work=rehearse)
    assert isinstance(listener, Listener)
    assert record.steps[0]["details"]["rows"] == [WORDS + 4, 384]
    assert not (tmp_path / "out").exists()


def test_the_teacher_keeps_its_probabilities(model: Path) -> None:
    """A removed token's probability is its first part's."""
    source = worded_llama()
    _, trimmed = trim(model, source, 320)
    ids = torch.tensor([[3, 300, 7]])
    with torch.no_grad():
        found = InRemaining(source, trimmed)(ids, use_cache=False).logits.exp()[0, -1]
        whole = torch.softmax(source(torch.tensor(trimmed.kept)[ids]).logits[0, -1], -1)
    expected = torch.zeros(len(trimmed.kept))
    for token, parts in enumerate(trimmed.parts):
        if parts:
            expected[parts[0]] += whole[token]
    torch.testing.assert_close(found, expected / expected.sum())
