"""The cost of `prune-structured` at several ratios, for one model, on texts that influenced no choice.

    python scripts/compare_pruning.py MODEL [--ratios 0.05 0.1] [--importance curvature taylor] [--text FILE]

Choices are made on the texts that calibrate an export. The table is measured on the texts that judge one, and on the
first 8,192 tokens of FILE in windows of 512: KL divergence from the whole model in nats a token, and perplexity. Each
importance is computed once for all ratios, as in the step; "not refitted" is the step with `refit = false`.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import TYPE_CHECKING

import torch
from compare_importance import Judge
from given import existing_file

from edgelm.export.compress.importance.influence import all_windows
from edgelm.export.compress.steps.prune_structured import PruneStructured
from edgelm.export.libraries import quiet_libraries
from edgelm.export.module.units import find_blocks
from edgelm.export.source.finding import find_source
from edgelm.export.source.loading import describe_source, load_module
from edgelm.export.texts import built_in_texts, calibrating_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT_TOKENS = 8192


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--importance", nargs="+", default=["curvature"], choices=("curvature", "taylor", "magnitude"))
    parser.add_argument("--not-refitted", action="store_true", help="also without refitting matrices")
    parser.add_argument("--text", type=existing_file, metavar="FILE")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = find_source(arguments.model, None)
    module = load_module(folder).requires_grad_(False)
    source = describe_source(arguments.model, folder, module)

    def encode(text: str) -> list[int]:
        return list(source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts = built_in_texts()
    chosen_by = encode("\n\n".join([*calibrating_texts(), texts.calibrating]))
    judges = [Judge(module, [encode(text) for _, text in texts.judging], source.context_length)]
    if arguments.text is not None:
        judges.append(Judge(module, _pieces(encode(arguments.text.read_text(encoding="utf-8"))), source.context_length))
    print("| importance | removed | " + " | ".join(f"text {i + 1}: KL, perplexity" for i in range(len(judges))) + " |")
    print("|---|---|" + "---|" * len(judges))
    print("| | 0 % | " + " | ".join(f"0, {judge.perplexity:.2f}" for judge in judges) + " |", flush=True)
    windows = all_windows(chosen_by, source.context_length)
    for importance in arguments.importance:
        _compare(module, PruneStructured(0.5, importance), windows, judges, arguments)


def _pieces(ids: list[int]) -> list[list[int]]:
    """Eight texts of 512 tokens from all over the first 8,192."""
    return [ids[begin : begin + 512] for begin in range(0, min(len(ids), _TEXT_TOKENS) - 511, 1024)]


def _compare(
    module: PreTrainedModel,
    step: PruneStructured,
    windows: list[torch.Tensor],
    judges: list[Judge],
    arguments: argparse.Namespace,
) -> None:
    """The rows of one importance."""
    started = time.monotonic()
    blocks = find_blocks(module)
    found = step.measured(module, blocks, windows)
    print(f"<!-- {step.importance}: {time.monotonic() - started:.0f} s to measure -->", flush=True)
    for ratio in arguments.ratios:
        for refit in (True, False) if arguments.not_refitted else (True,):
            smaller = copy.deepcopy(module)
            PruneStructured(ratio, step.importance, refit).cut(smaller, blocks, *found)
            removed = 100 * (1 - smaller.num_parameters() / module.num_parameters())
            cells = []
            for judge in judges:
                divergence, perplexity = judge.measure(smaller)
                rise = 100 * (perplexity / judge.perplexity - 1)
                cells.append(f"{divergence:.3f}, {perplexity:.2f} ({rise:+.1f} %)")
            name = step.importance if refit else f"{step.importance}, not refitted"
            print(f"| {name} | {removed:.1f} % | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
