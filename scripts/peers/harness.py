"""Convert a model for one peer, or measure one quantity of one peer, in this process. Needs only the standard library,
and numpy for quality.

    python -m peers.harness convert ADAPTER VARIANT --model FOLDER --folder FOLDER --result FILE
    python -m peers.harness measure ADAPTER VARIANT --folder FOLDER --kind first --threads N --vocab N --result FILE
    python -m peers.harness quality ADAPTER VARIANT --folder FOLDER --task-file FILE --threads N --result FILE

`first` is the experience of a program started for one prompt: the times to load and to the first token after 128,
without warm-up. Otherwise the kind is a number of context tokens: the speed of reading such a prompt, and of generating
after it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

COLD = "first"
COLD_TOKENS = 128
DECODE_TOKENS = 64
REPEATS = 2


class Model(Protocol):
    """A loaded model of a peer."""

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        """The `count` most likely tokens after `ids`, one by one, without reuse of an earlier call."""


def main() -> None:
    """Parse, then run; figures go to a file, because peers print freely."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("convert", "measure", "quality"))
    parser.add_argument("adapter", help="a module beside this one")
    parser.add_argument("variant")
    parser.add_argument("--folder", type=Path, required=True, help="the peer's form of the model")
    parser.add_argument("--model", type=Path, help="the model to convert")
    parser.add_argument("--kind", help=f"{COLD!r}, or a number of tokens of context")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--task-file", type=Path, help="texts and prompts for quality, see quality.py")
    parser.add_argument("--reference", action="store_true", help="this peer is the reference for the others")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary, for the prompts")
    parser.add_argument("--result", type=Path, required=True, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    started = time.perf_counter()
    adapter = importlib.import_module(f"peers.{arguments.adapter}")
    if arguments.task == "convert":
        adapter.convert(arguments.model, arguments.folder, arguments.variant)
        arguments.result.write_text("{}", encoding="utf-8")
        return
    importing = time.perf_counter() - started
    load = functools.partial(adapter.load, arguments.folder, arguments.variant, arguments.threads)
    if arguments.task == "quality":
        figures = quality(load, arguments.task_file, arguments.reference)
        arguments.result.write_text(json.dumps(figures), encoding="utf-8")
        return
    if arguments.kind == COLD:
        files = [path for pattern in adapter.FILES for path in arguments.folder.glob(pattern)]
        figures = {"import_s": importing, "file_mb": sum(path.stat().st_size for path in files) / 1e6}
        figures |= cold(load, arguments.vocab)
    else:
        figures = warm(load, int(arguments.kind), arguments.vocab)
    figures |= {f"{name}_{arguments.kind}": size for name, size in memory().items()}
    arguments.result.write_text(json.dumps(figures), encoding="utf-8")


def cold(load: Callable[[int], Model], vocab: int) -> dict[str, Any]:
    """Seconds to load, and from then to the first token after a prompt, without warm-up."""
    started = time.perf_counter()
    model = load(COLD_TOKENS + DECODE_TOKENS)
    loaded = time.perf_counter()
    next(iter(model.generate(prompt(COLD_TOKENS, 0, vocab), 2)))
    return {"load_s": loaded - started, "first_token_s": time.perf_counter() - started}


def warm(load: Callable[[int], Model], context: int, vocab: int) -> dict[str, Any]:
    """Tokens per second of reading a prompt and of generating after it, medians of runs after an uncounted one."""
    model = load(context + DECODE_TOKENS)
    timed(model, prompt(context, 0, vocab), 4)
    runs = [timed(model, prompt(context, repeat, vocab), DECODE_TOKENS) for repeat in range(1, REPEATS + 1)]
    return {
        f"prefill_{context}": context / statistics.median(first for first, _, _ in runs),
        f"decode_{context}": statistics.median(rate for _, rate, _ in runs),
        f"tokens_{context}": runs[0][2],
    }


def quality(load: Callable[[int], Model], file: Path, is_reference: bool) -> dict[str, Any]:
    """Figures of `quality.py`; the reference's rows are stored beside the task."""
    from . import quality as measures

    task = measures.read_task(file)
    longest = max(task["window"], *(len(prompt) + task["answer_tokens"] for prompt in task["prompts"]), 0)
    model: Any = load(longest + 1)
    return measures.measure(model, task, file.parent, is_reference)


def timed(model: Model, ids: list[int], count: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, tokens per second after it, and the tokens."""
    tokens, stamps = [], []
    started = time.perf_counter()
    for token in model.generate(ids, count):
        stamps.append(time.perf_counter())
        tokens.append(token)
    if len(tokens) != count:
        raise SystemExit(f"{len(tokens)} tokens came instead of {count}")
    return stamps[0] - started, (count - 1) / (stamps[-1] - stamps[0]), tokens


def prompt(count: int, repeat: int, vocab: int) -> list[int]:
    """Token ids, the same for every peer; the first token differs per repeat, so that no cache knows the prompt."""
    low = vocab // 50
    return [low + repeat, *(low + 7 * position % (vocab - 2 * low) for position in range(1, count))]


def memory() -> dict[str, float]:
    """The process's peak physical memory in MB, and the part now in use that is not mapped files."""
    path = Path("/proc/self/status")
    if path.exists():
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
        peak, own = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmHWM", "RssAnon"))
        return {"peak_mb": peak, "own_mb": own}
    import resource  # not on Windows; on Linux it would include the parent's memory before exec

    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


if __name__ == "__main__":
    main()
