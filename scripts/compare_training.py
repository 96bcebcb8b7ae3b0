"""What the steps that train give back: perplexities on stories that nothing was trained on, of `builtin:tales`.

    python scripts/compare_training.py TEXTS [--only recover|distil|quantization-aware] [--steps 100]

TEXTS holds `tinystories/tinystories_1000.json`. The stories are split as `train_example_model.py` split them when it
trained the model, so its held-out stories are held out here as well. Perplexity is that of the graph that a bundle
ships, INT8 by row with a float32 cache, in the runtime; windows of 512 tokens of which 256 count.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from train_example_model import END_OF_TEXT, STORIES, Recipe, read_stories

from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.steps import Workbench
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.source import find_source, load_module
from edgelm.export.trace import trace_model
from edgelm.runtime import machine
from edgelm.runtime.manifest import CacheType, Model
from edgelm.runtime.scoring import negative_log_likelihood, score
from edgelm.runtime.session import make_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 100
_CONTEXT, _CHOOSING, _WINDOW = 1024, 4096, 512


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was done, parameters, held-out perplexity as float32 and as INT8, seconds."""

    name: str
    parameters: int
    fp32: float
    int8: float
    seconds: float


class Comparison:
    """The model, the texts, and what every comparison does with them."""

    def __init__(self, texts: Path, steps: int) -> None:
        import transformers

        self._folder = find_source("builtin:tales", None)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        stories = read_stories(texts / STORIES, Recipe())
        self._work = Path(tempfile.mkdtemp(prefix="compare-training-"))
        self._text = self._work / "train.txt"
        self._text.write_text(_joined(stories.train), encoding="utf-8")
        self._held_out = self._ids(_joined(stories.held_out))
        self._choosing = self._ids(_joined(stories.train))[:_CHOOSING]
        self._runs = 0
        self._training = {"text": str(self._text), "steps": steps, "batch": 8, "length": 128}
        self.source = load_module(self._folder)

    def trained(self, use: str, **keys: Any) -> dict[str, Any]:
        """A step that trains on the stories that are for it."""
        return {"use": use, **self._training, **{key.replace("_", "-"): value for key, value in keys.items()}}

    def apply(self, module: PreTrainedModel, *steps: dict[str, Any]) -> PreTrainedModel:
        """A copy of a module, after these steps."""
        module = copy.deepcopy(module)
        for step in parse_recipe({"step": list(steps)}, "comparison", "comparison").steps:
            self._runs += 1
            place = self._work / str(self._runs)
            bench = Workbench(self._choosing, self._tokenizer, self._folder, place, _CONTEXT, lambda _: None)
            module = step.apply(module, bench).module
        return module

    def row(self, name: str, make: Callable[[], PreTrainedModel]) -> Row:
        """Make a module and measure it."""
        started = time.perf_counter()
        module = make()
        seconds = time.perf_counter() - started
        fp32, int8 = (self._perplexity(module, scheme) for scheme in ("fp32", "int8-rowwise"))
        row = Row(name, module.num_parameters(), fp32, int8, seconds)
        print(
            f"{name:44}{row.parameters:12,}{fp32:10.3f}{int8:10.3f}{100 * (int8 / fp32 - 1):+9.3f} %{seconds:8.0f} s",
            flush=True,
        )
        return row

    def _perplexity(self, module: PreTrainedModel, scheme: str) -> float:
        traced = trace_model(module)
        passes = [*fusing_passes(_CONTEXT), *quantizing_passes(scheme, 8, {})]
        ir.passes.PassManager(passes)(traced.graph)
        graph = self._work / "model.onnx"
        graph.with_suffix(".data").unlink(missing_ok=True)
        ir.save(traced.graph, graph, external_data="model.data")
        model = Model(
            vocab_size=int(module.config.vocab_size),
            context_length=_CONTEXT,
            parameters=module.num_parameters(),
            layers=traced.layers,
            kv=CacheType("float32", None),
            cache_layout=traced.layout,
            states=traced.states,
            step_tokens=traced.step_tokens,
        )
        session = make_session(graph, model, machine.default_threads(), ["CPUExecutionProvider"])
        try:
            loss = count = 0.0
            for targets, logits in score(session, self._held_out, _WINDOW, _WINDOW // 2):
                loss, count = loss + float(negative_log_likelihood(logits, targets).sum()), count + len(targets)
        finally:
            session.close()
        return math.exp(loss / count)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def compare_recover(comparison: Comparison) -> list[Row]:
    """30 % of the parameters pruned, then tuned: within 10 % of the model's perplexity."""
    prune = {"use": "prune-structured", "ratio": 0.3}
    pruned = comparison.apply(comparison.source, prune)
    tune, low_rank, learn = (
        comparison.trained("recover", learning_rate=3e-4),
        comparison.trained("recover", learning_rate=2e-3, lora_rank=16),
        comparison.trained("distil", learning_rate=1e-3, alpha=1.0),
    )
    return [
        comparison.row("prune-structured 30 %", lambda: pruned),
        comparison.row("prune-structured 30 %, recover", lambda: comparison.apply(pruned, tune)),
        comparison.row("prune-structured 30 %, recover, rank 16", lambda: comparison.apply(pruned, low_rank)),
        comparison.row("prune-structured 30 %, distil", lambda: comparison.apply(pruned, learn)),
    ]


def compare_distil(comparison: Comparison) -> list[Row]:
    """Half of the parameters: learning from the large model against learning from the text alone, with equal steps."""
    half = comparison.apply(comparison.source, {"use": "prune-structured", "ratio": 0.5})
    rows = [comparison.row("prune-structured 50 %", lambda: half)]
    for name, keys in (("text alone (alpha 0)", {"alpha": 0.0}), ("distil (alpha 1)", {"alpha": 1.0})):
        learn = comparison.trained("distil", learning_rate=1e-3, **keys)
        rows.append(comparison.row(f"prune-structured 50 %, {name}", lambda learn=learn: comparison.apply(half, learn)))
    return rows


def compare_quantization_aware(comparison: Comparison) -> list[Row]:
    """Tuned with and without INT8 in the forward pass: what INT8 then costs."""
    keys = {"learning_rate": 1e-4}
    return [
        comparison.row(use, lambda use=use: comparison.apply(comparison.source, comparison.trained(use, **keys)))
        for use in ("recover", "quantization-aware")
    ]


COMPARISONS = {"recover": compare_recover, "distil": compare_distil, "quantization-aware": compare_quantization_aware}


def _joined(stories: Sequence[str]) -> str:
    return END_OF_TEXT + END_OF_TEXT.join(stories) + END_OF_TEXT


def compare(texts: Path, steps: int, names: Iterable[str] = tuple(COMPARISONS)) -> None:
    """Print the table of these comparisons."""
    comparison = Comparison(texts, steps)
    print(f"{'':44}{'parameters':>12}{'fp32':>10}{'INT8':>10}{'INT8 costs':>11}{'trained in':>10}")
    comparison.row("builtin:tales", lambda: comparison.source)
    for name in names:
        COMPARISONS[name](comparison)


def main() -> None:
    """Parse, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path, help="folder of the texts")
    parser.add_argument("--only", choices=sorted(COMPARISONS), action="append", help="one of the comparisons")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compare(given.texts, given.steps, given.only or COMPARISONS)


if __name__ == "__main__":
    main()
