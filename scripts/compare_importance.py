"""Which layers a model misses least, by four measures: the loss when so many layers are removed.

    python scripts/compare_importance.py MODEL... [--parts layers|attention] [--counts 1 2 4] [--text FILE]

MODEL is a folder, a GGUF file or a builtin model. Layers are chosen on the text that calibrates an export, or on the
first half of FILE. The table is measured on the texts that judge an export, or on the second half, which no measure
sees: KL divergence from the whole model in nats a token, and perplexity. `random` is the mean of three choices. Taylor
is |gradient of the loss times what the part adds to the stream|, summed over the stream, averaged over tokens
(Molchanov et al., arXiv 1906.10771).
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from given import existing_file

from edgelm.export.compress.importance.influence import attention_influence, layer_influence, windows
from edgelm.export.compress.importance.leaving_out import least_missed_attention, least_missed_layers
from edgelm.export.libraries import quiet_libraries
from edgelm.export.module.edits import edit, present_layers
from edgelm.export.module.structure import attention_sublayers, observed
from edgelm.export.source.finding import find_source
from edgelm.export.source.loading import describe_source, load_module
from edgelm.export.texts import built_in_texts, calibrating_texts, cut_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOW, _WINDOWS, _SEEDS = 512, 8, 3


@dataclass(frozen=True)
class Parts:
    """The parts to remove. names: of the submodules, by index; edit: removes them."""

    edit: str
    names: dict[int, str]
    influence: Any
    least: Any


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--parts", choices=("layers", "attention"), default="layers")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="numbers of parts to remove")
    parser.add_argument("--text", type=existing_file, metavar="FILE", help="a text of the kind that the models know")
    arguments = parser.parse_args()
    quiet_libraries()
    for model in arguments.models:
        compare(model, arguments.parts, arguments.counts, arguments.text)


def compare(model: str, kind: str, counts: list[int], text: Path | None) -> None:
    """The table of one model."""
    folder = find_source(model, None)
    module = load_module(folder).requires_grad_(False)
    source = describe_source(model, folder, module)

    def encode(text: str) -> list[int]:
        return list(source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts = built_in_texts() if text is None else cut_text(text.read_text(encoding="utf-8"), str(text))
    choosing = [
        token for part in [*(calibrating_texts() if text is None else ()), texts.calibrating] for token in encode(part)
    ]
    judge = Judge(module, [encode(part) for _, part in texts.judging], source.context_length)
    parts = _parts(module, kind)
    print(f"\n{source.name}: {len(parts.names)} {kind}, chosen on {len(choosing):,} tokens, perplexity of the whole")
    print(f"model {judge.perplexity:.3f} on {judge.tokens:,} other tokens\n")
    print(f"| {kind} left out | " + " | ".join(map(str, counts)) + " | seconds to choose |")
    print("|---|" + "---|" * len(counts) + "---|")
    for name, choices, seconds in _choices(module, parts, choosing, source.context_length, counts):
        cells = [_cell(module, parts, chosen, judge) for chosen in choices]
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


class Judge:
    """The predictions of a whole model on texts, and the distance of others from them."""

    def __init__(self, module: PreTrainedModel, texts: list[list[int]], context_length: int) -> None:
        size = min(_WINDOW, context_length)
        most = _WINDOWS // len(texts)
        cut = [ids[begin : begin + size] for ids in texts for begin in range(0, most * size, size)]
        self._windows = [torch.tensor([ids]) for ids in cut if len(ids) > 1]
        self._whole = [self._says(module, window) for window in self._windows]
        self.tokens = sum(window.shape[1] for window in self._windows)
        self.perplexity = self.measure(module)[1]

    def measure(self, module: PreTrainedModel) -> tuple[float, float]:
        """KL in nats a token, and perplexity."""
        divergence, losses = 0.0, []
        for window, whole in zip(self._windows, self._whole, strict=True):
            said = self._says(module, window)
            divergence += float((whole.exp() * (whole - said)).sum())
            losses.append(-said[:-1].gather(1, window[0, 1:, None]).flatten())
        return divergence / self.tokens, float(torch.cat(losses).mean().exp())

    @staticmethod
    def _says(module: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = module(input_ids=window, use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)


def _parts(module: PreTrainedModel, kind: str) -> Parts:
    if kind == "layers":
        return Parts("drop_layers", present_layers(module), layer_influence, least_missed_layers)
    return Parts("skip_attention", attention_sublayers(module), attention_influence, least_missed_attention)


def _choices(
    module: PreTrainedModel, parts: Parts, ids: list[int], context_length: int, counts: list[int]
) -> Iterator[tuple[str, list[list[list[int]]], float]]:
    """For each measure: its name, the choices to average for each count, and the seconds it took."""
    drawn = [np.random.default_rng(seed).permutation(sorted(parts.names)).tolist() for seed in range(_SEEDS)]
    yield "random", [[order[:count] for order in drawn] for count in counts], 0.0
    started = time.monotonic()
    influence = parts.influence(module, ids, context_length)
    seconds = time.monotonic() - started
    yield "block influence", _firsts(influence, counts), seconds
    started = time.monotonic()
    yield "Taylor", _firsts(_taylor(module, parts, ids, context_length), counts), time.monotonic() - started
    started = time.monotonic()
    order = list(parts.least(module, max(counts), ids, context_length, influence))
    yield "measured", [[order[:count]] for count in counts], seconds + time.monotonic() - started


def _firsts(values: dict[int, float], counts: list[int]) -> list[list[list[int]]]:
    order = sorted(values, key=lambda index: values[index])
    return [[order[:count]] for count in counts]


def _taylor(module: PreTrainedModel, parts: Parts, ids: list[int], context_length: int) -> dict[int, float]:
    """First-order effect of each part, by index."""
    effects = dict.fromkeys(parts.names, 0.0)
    whole = parts.edit == "drop_layers"
    embedding: Any = module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    for window in windows(ids, context_length):
        with observed(module, parts.names) as seen:
            loss = module(input_ids=window, labels=window, use_cache=False).loss
        outputs = {i: out[0] if isinstance(out, tuple) else out for i, [(_, out)] in seen.items()}
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for (index, output), gradient in zip(outputs.items(), gradients, strict=True):
            added = output - seen[index][0][0] if whole else output
            effects[index] += float((added.detach() * gradient).sum(-1).abs().mean())
    handle.remove()
    return effects


def _cell(module: PreTrainedModel, parts: Parts, choices: list[list[int]], judge: Judge) -> str:
    """KL and perplexity, averaged over choices; the geometric mean for perplexity."""
    found = []
    for chosen in choices:
        smaller = copy.deepcopy(module)
        edit(smaller, parts.edit, layers=chosen)
        found.append(judge.measure(smaller))
    divergence, perplexity = np.mean([kl for kl, _ in found]), np.exp(np.mean([np.log(other) for _, other in found]))
    which = f" ({', '.join(map(str, sorted(choices[0])))})" if len(choices) == 1 else ""
    return f"{divergence:.3f}, {perplexity:.2f}{which}"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
