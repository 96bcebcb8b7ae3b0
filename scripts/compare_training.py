"""What training steps recover: perplexities of `builtin:tales` on stories that were not trained on.

    python scripts/compare_training.py TEXTS [--only recover|distil|quantization-aware] [--steps 100]

TEXTS holds `tinystories/tinystories_1000.json`. The stories are split as in `train_example_model.py`, which trained the
model, so its held-out stories are held out here too. Perplexity is that of a bundle's graph, INT8 by row with a float32
cache, in the runtime, in windows of 512 tokens of which 256 count.

INT8 costs less than perplexities of 50 stories can resolve. Its cost is measured token by token against float32, on
these stories and on the 50 that only chose the model's checkpoint. The error is that of the mean, by bootstrap over
stories. (Two more versions of each story, with other names, reduced it only by a sixth.) The mean KL divergence from
the model's own predictions is the cost on text that the model itself would write. It is far more exact, because no
token is sampled.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from example_model.model import END_OF_TEXT
from example_model.texts import STORIES, Recipe, read_stories
from given import existing_folder
from numpy.typing import NDArray

from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.step import Workbench
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.source.finding import find_source
from edgelm.export.source.loading import load_module
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.manifest import CacheType, Model
from edgelm.runtime.evaluation.scoring import score
from edgelm.runtime.host import machine
from edgelm.runtime.sessions.loading import make_session
from edgelm.runtime.sessions.protocol import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 100
_CONTEXT, _CHOOSING, _WINDOW = 1024, 4096, 512
_RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a graph on all texts, by token, in nats: negative log-likelihoods, and KL divergences from the model's
    predictions, both (tokens) float64."""

    losses: NDArray[np.float64]
    divergences: NDArray[np.float64]


class Comparison:
    """The model, the texts, and the operations shared by all comparisons."""

    def __init__(self, texts: Path, steps: int) -> None:
        import transformers

        self._folder = find_source("builtin:tales", None)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        stories = read_stories(texts / STORIES, Recipe())
        self._work = Path(tempfile.mkdtemp(prefix="compare-training-"))
        self._text = self._work / "train.txt"
        self._text.write_text(_joined(stories.train), encoding="utf-8")
        # The first part is for perplexities.
        self._texts = [self._ids(_joined(part)) for part in (stories.held_out, stories.dev)]
        self._story = self._stories_of_tokens()
        self._choosing = self._ids(_joined(stories.train))[:_CHOOSING]
        self._runs = 0
        self._training = {"text": str(self._text), "steps": steps, "batch": 8, "length": 128}
        self.source = load_module(self._folder)
        self._reference = self._session(self.source, "fp32")
        self._plain = self._score(self._reference).losses

    def trained(self, use: str, **keys: Any) -> dict[str, Any]:
        """A step that trains on the training stories, in float32 on every processor."""
        return {
            "use": use,
            **self._training,
            "precision": "float32",
            **{key.replace("_", "-"): value for key, value in keys.items()},
        }

    def apply(self, module: PreTrainedModel, *steps: dict[str, Any]) -> PreTrainedModel:
        """A copy of a module after these steps."""
        module = copy.deepcopy(module)
        for step in parse_recipe({"step": list(steps)}, "comparison", "comparison").steps:
            self._runs += 1
            place = self._work / str(self._runs)
            bench = Workbench(self._choosing, self._tokenizer, self._folder, place, _CONTEXT, lambda _: None)
            module = step.apply(module, bench).module
        return module

    def row(self, name: str, make: Callable[[], PreTrainedModel]) -> None:
        """Make a module, measure it, and print a line."""
        started = time.perf_counter()
        module = make()
        seconds = time.perf_counter() - started
        fp32, int8 = (self._score(self._session(module, scheme)) for scheme in ("fp32", "int8-rowwise"))
        print(
            f"{name:40}{module.num_parameters():11,}"
            + "".join(f"{self._perplexity(one):9.3f}" for one in (fp32, int8))
            + f"{self._difference(fp32.losses, int8.losses):>18}"
            + "".join(f"{self._difference(self._plain, one.losses):>18}" for one in (fp32, int8))
            + "".join(f"{100 * one.divergences.mean():>9.3f} %" for one in (fp32, int8))
            + f"{seconds:7.0f} s",
            flush=True,
        )

    def _session(self, module: PreTrainedModel, scheme: str) -> Session:
        traced = trace_model(module)
        passes = [*fusing_passes(_CONTEXT), *quantizing_passes(scheme, 8, {})]
        ir.passes.PassManager(passes)(traced.graph)
        graph = Path(tempfile.mkdtemp(dir=self._work)) / "model.onnx"
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
        return make_session(graph, model, machine.default_threads(), ["CPUExecutionProvider"])

    def _score(self, session: Session) -> Scores:
        """Scores of a session, which is closed unless it is the reference's."""
        losses, divergences = [], []
        for text in self._texts:
            wanted = np.concatenate(list(_predictions(self._reference, text)))
            own = wanted if session is self._reference else np.concatenate(list(_predictions(session, text)))
            losses.append(-own[np.arange(len(own)), text[1:]].astype(np.float64))
            divergences.append((np.exp(wanted) * (wanted - own)).sum(1, dtype=np.float64))
        if session is not self._reference:
            session.close()
        return Scores(np.concatenate(losses), np.concatenate(divergences))

    def _perplexity(self, scores: Scores) -> float:
        return math.exp(scores.losses[: len(self._texts[0]) - 1].mean())

    def _difference(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
        """The difference in perplexity, in percent, and its standard error."""
        sums, counts = np.bincount(self._story, other - one), np.bincount(self._story)
        picks = np.random.default_rng(0).integers(0, len(sums), (_RESAMPLES, len(sums)))
        error = float((sums[picks].sum(1) / counts[picks].sum(1)).std())
        return f"{100 * math.expm1((other - one).mean()):+.3f} +- {100 * error:.3f} %"

    def _stories_of_tokens(self) -> NDArray[np.int64]:
        """The story number of each scored token, the end of a story included."""
        end = self._ids(END_OF_TEXT)[0]
        ends = np.concatenate([np.asarray(text[1:]) == end for text in self._texts])
        return np.asarray(np.cumsum(ends) - ends)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def compare_recover(comparison: Comparison) -> None:
    """30 % of the parameters pruned, then tuned: within 10 % of the model's perplexity."""
    prune = {"use": "prune-structured", "ratio": 0.3}
    pruned = comparison.apply(comparison.source, prune)
    tune, low_rank, learn = (
        comparison.trained("recover", learning_rate=3e-4),
        comparison.trained("recover", learning_rate=2e-3, lora_rank=16),
        comparison.trained("distil", learning_rate=1e-3, alpha=1.0),
    )
    comparison.row("prune-structured 30 %", lambda: pruned)
    comparison.row("prune-structured 30 %, recover", lambda: comparison.apply(pruned, tune))
    comparison.row("prune-structured 30 %, recover, rank 16", lambda: comparison.apply(pruned, low_rank))
    comparison.row("prune-structured 30 %, distil", lambda: comparison.apply(pruned, learn))


def compare_distil(comparison: Comparison) -> None:
    """Half of the parameters: learning from the large model against learning only from the text, with equal steps."""
    half = comparison.apply(comparison.source, {"use": "prune-structured", "ratio": 0.5})
    comparison.row("prune-structured 50 %", lambda: half)
    for name, keys in (("text alone (alpha 0)", {"alpha": 0.0}), ("distil (alpha 1)", {"alpha": 1.0})):
        learn = comparison.trained("distil", learning_rate=1e-3, **keys)
        comparison.row(f"prune-structured 50 %, {name}", lambda learn=learn: comparison.apply(half, learn))


def compare_quantization_aware(comparison: Comparison) -> None:
    """Tuned with INT8 in the forward pass, with three seeds, and for the default length: the remaining cost of INT8."""
    keys: dict[str, dict[str, Any]] = {f"seed {seed}": {"seed": seed} for seed in range(3)}
    for name, chosen in (keys | {"default length": {"steps": 200, "length": 256}}).items():
        tune = comparison.trained("quantization-aware", **chosen)
        comparison.row(f"quantization-aware, {name}", lambda tune=tune: comparison.apply(comparison.source, tune))


COMPARISONS = {"recover": compare_recover, "distil": compare_distil, "quantization-aware": compare_quantization_aware}


def _predictions(session: Session, text: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """Log-probabilities of every token at each position of a text except its last, piece by piece."""
    for _, logits in score(session, text, _WINDOW, _WINDOW // 2):
        shifted = logits - logits.max(1, keepdims=True)
        yield shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _joined(stories: Sequence[str]) -> str:
    return END_OF_TEXT + END_OF_TEXT.join(stories) + END_OF_TEXT


def compare(texts: Path, steps: int, names: Iterable[str] = tuple(COMPARISONS)) -> None:
    """Print the table of these comparisons."""
    comparison = Comparison(texts, steps)
    print(
        f"{'':40}{'parameters':>11}{'fp32':>9}{'INT8':>9}{'INT8 to fp32':>18}{'fp32 to the model':>18}"
        f"{'INT8 to the model':>18}{'KL fp32':>11}{'KL INT8':>11}{'trained':>9}"
    )
    comparison.row("builtin:tales", lambda: comparison.source)
    for name in names:
        COMPARISONS[name](comparison)


def main() -> None:
    """Parse, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=existing_folder, help="folder of the texts")
    parser.add_argument("--only", choices=sorted(COMPARISONS), action="append", help="one of the comparisons")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each training (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compare(given.texts, given.steps, given.only or COMPARISONS)


if __name__ == "__main__":
    main()
