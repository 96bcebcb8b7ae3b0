"""Models with random weights to measure: a Llama of SmolLM2-135M's sizes, and other shapes of `scripts/reference`."""

from __future__ import annotations

import itertools
import string
import sys
import time
from pathlib import Path

_CONFIGS = Path(__file__).parent / "reference"
REFERENCE = _CONFIGS / "config.json"
SHAPES = {"llama": REFERENCE, "gemma3": _CONFIGS / "gemma3.json", "qwen3": _CONFIGS / "qwen3.json"}


def prepare(model: Path, bundle: Path, kv: str, config: Path = REFERENCE) -> None:
    """Build a model from a configuration and export it, unless an earlier run did."""
    if not (model / "tokenizer.json").is_file():
        build_model(model, config, "float32")
    export(model, bundle, kv, str(random_target(bundle.parent)))


def export(model: Path, bundle: Path, kv: str, target: str | None = None) -> None:
    """Export a model, unless an earlier run did."""
    if not (bundle / "manifest.json").is_file():
        from edgelm.export import ExportConfig, export_model

        started = time.perf_counter()
        export_model(ExportConfig(str(model), target=target, kv=kv, out=bundle))
        print(f"exported in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def random_target(folder: Path) -> Path:
    """This machine's target without quality limits: random weights have no quality, and nothing to base a choice of
    arithmetic on, so activations have 16 bits everywhere."""
    from edgelm.targets import native_target

    base = native_target()
    limits = "mean_kl = 10.0\np99_kl = 100.0\nperplexity_increase_percent = 1000.0\nagreement_percent = 0.0\n"
    text = f'extends = "{base}"\nname = "{base}"\n[gate]\n{limits}answers_percent = 0.0\nactivations_kl = 1e-12\n'
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "random.toml"
    path.write_text(text, encoding="utf-8")
    return path


def build_model(folder: Path, config_file: Path, dtype: str) -> None:
    """Write a model folder with random weights of this type, and a tokenizer of the full vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_file)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(getattr(torch, dtype)).save_pretrained(folder)
    build_tokenizer(folder, config.vocab_size)


def build_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer whose tokens are all strings of two and of three letters, and some of four: as large
    as a real one with this vocabulary, and as slow to load and run."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    vocab = {end: 0} | {item: i for i, item in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    merges: list[tuple[str, str]] = []
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            if len(vocab) == vocab_size:
                tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.decoder = decoders.ByteLevel()
                tokenizer.add_special_tokens([AddedToken(end, special=True)])
                PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(
                    folder
                )
                return
            word = "".join(letters)
            vocab[word] = len(vocab)
            merges.append((word[:-1], word[-1]))
