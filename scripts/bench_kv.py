"""Measure what an INT8 KV cache gains and costs against a float32 one.

    python scripts/bench_kv.py [--work build/bench] [--rounds 7] [--threads 2] [--text FILE] [--json FILE]

Opens two bundles of `bench.py`'s reference model (135M parameters, random weights) that differ only in their cache.
Each round runs the same prompts on both, in alternation, without draft tokens and without reuse, so that other load on
the machine affects both. Prints medians, and the median and range of each round's ratio int8 / float32. Perplexity
needs a trained model: it is measured for builtin:tales on a text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import CONTEXTS, DECODE_TOKENS
from reference_model import prepare

from edgelm.runtime import Bundle, load
from edgelm.runtime.evaluation.scoring import perplexity
from edgelm.runtime.sessions.kv_cache import KVCache
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.text.tokenizer import Tokenizer

KINDS = ("int8", "float32")
_TEXT = Path(__file__).parents[1] / "export" / "text" / "default.txt"


def main() -> None:
    """Build what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for models and bundles, kept")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each context (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (%(default)s)")
    parser.add_argument("--text", type=Path, default=_TEXT, help="text for perplexity (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    arguments = parser.parse_args()
    bundles = {kv: arguments.work / f"bundle-{kv}" for kv in KINDS}
    stories = {kv: arguments.work / f"tales-{kv}" for kv in KINDS}
    for kv in KINDS:
        prepare(arguments.work / "model", bundles[kv], kv)
        _prepare_stories(stories[kv], kv)
    figures = {
        "speed": measure_speed(bundles, arguments.rounds, arguments.threads),
        "kv_bytes_per_token": {
            kv: KVCache(Bundle.open(bundles[kv]).manifest.model).bytes_per_position() for kv in KINDS
        },
        "perplexity": {kv: _perplexity(stories[kv], arguments.text, arguments.threads) for kv in KINDS},
    }
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_speed(bundles: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """For each figure, the medians of both bundles, and the ratio int8 / float32 of each round."""
    engines = {
        kv: load(path, threads=threads, response_cache=False, prefix_cache=False) for kv, path in bundles.items()
    }
    seen: dict[str, list[dict[str, float]]] = {}
    # One uncounted round loads the weights into memory.
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        for context in CONTEXTS:
            runs: dict[str, dict[str, float]] = {}
            for kv in KINDS if number % 2 else reversed(KINDS):
                for name, value in _run(engines[kv], context, number):
                    runs.setdefault(name, {})[kv] = value
            for name, values in runs.items():
                seen.setdefault(name, []).append(values)
    for engine in engines.values():
        engine.close()
    return {name: _summary(values[1:]) for name, values in seen.items()}


def _run(engine: Any, context: int, number: int) -> Iterator[tuple[str, float]]:
    # The first token differs each time, so that nothing is reused from an earlier prompt.
    ids = [number + context, *(1000 + 7 * index % 40000 for index in range(context - 1))]
    done = engine.generate(token_ids=ids, max_tokens=DECODE_TOKENS, lookup=False)
    if done.stats.reused_tokens or done.stats.generated_tokens != DECODE_TOKENS:
        raise SystemExit(f"a prompt of {context} tokens was not computed as a whole, or its answer ended early")
    yield f"first_token_s_{context}", done.stats.time_to_first_token_s
    yield f"decode_tokens_per_s_{context}", done.stats.decode_tokens_per_s


def _summary(values: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [one["int8"] / one["float32"] for one in values]
    medians = {kv: statistics.median(one[kv] for one in values) for kv in KINDS}
    return {**medians, "ratio": statistics.median(ratios), "ratios": ratios}


def _prepare_stories(bundle: Path, kv: str) -> None:
    if not (bundle / "manifest.json").is_file():
        from edgelm.export import ExportConfig, export_model

        export_model(ExportConfig("builtin:tales", kv=kv, out=bundle))


def _perplexity(folder: Path, text: Path, threads: int) -> dict[str, float]:
    bundle = Bundle.open(folder)
    ids = Tokenizer(folder / "tokenizer.json").encode(text.read_text(encoding="utf-8"))
    session = open_session(bundle, threads)
    found = perplexity(session, ids, min(512, bundle.manifest.model.context_length))
    session.close()
    return {"value": found.value, "tokens": found.tokens}


def print_table(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"{'':28}{'int8':>12}{'float32':>12}{'ratio':>9}")
    for name, found in figures["speed"].items():
        span = f"({min(found['ratios']):.2f} to {max(found['ratios']):.2f})"
        print(f"{name:28}{found['int8']:>12,.3f}{found['float32']:>12,.3f}{found['ratio']:>9.3f} {span}")
    size, quality = figures["kv_bytes_per_token"], figures["perplexity"]
    print(f"{'kv_bytes_per_token':28}{size['int8']:>12,}{size['float32']:>12,}{size['int8'] / size['float32']:>9.3f}")
    values = [quality[kv]["value"] for kv in KINDS]
    print(f"{'perplexity, builtin:tales':28}{values[0]:>12,.3f}{values[1]:>12,.3f}{values[0] / values[1]:>9.4f}")


if __name__ == "__main__":
    main()
