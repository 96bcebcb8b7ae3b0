"""Compare compressed bundles with the one that nothing was left out of, on the reference model of `scripts/bench.py`.

    python scripts/compare_recipes.py [--work build/bench] [--rounds 5] [--threads 2] [--texts FOLDER] [--json FILE]

Each bundle is INT8 and passed the gate of its export. Each round loads every bundle in a fresh process, one after the
other; the table shows medians, and the median of each round's ratio to the uncompressed bundle. The reference has
random weights, which decide neither size nor speed; what steps cost in quality, and what training gives back, is
compared on a trained model, by `compare_training.py`, whose table follows where --texts names its texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import prepare

CONTEXTS = (128, 1900)
UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Case:
    """A recipe as text; least: the smallest ratio of decoding speed that each context promises; kv: the share of the
    cache's bytes that may stay."""

    recipe: str
    least: dict[int, float]
    kv: float


def cases(layers: int) -> dict[str, Case]:
    """What is compared, for a model of so many layers."""
    return {
        "skip half of attention": Case(
            f'[[step]]\nuse = "skip-attention"\nlast = {layers // 2}\n', {128: 1.15, 1900: 1.35}, 0.5
        ),
        "drop a third of layers": Case(f'[[step]]\nuse = "drop-layers"\nlast = {layers // 3}\n', {128: 1.35}, 2 / 3),
    }


def main() -> None:
    """Parse, then measure all (or, in a child process, one bundle). Exit status 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench"), help="folder for models and bundles, kept for the next run"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each bundle, in alternation (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    parser.add_argument(
        "--texts", type=Path, metavar="FOLDER", help="also compare the steps that train, on these texts"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.threads)))
        return
    model, whole = arguments.work / "model", arguments.work / "bundle-int8"
    prepare(model, whole, "int8")
    wanted = cases(layers_of(model))
    bundles = {UNCOMPRESSED: whole}
    for name, case in wanted.items():
        bundles[name] = arguments.work / f"compressed-{name.replace(' ', '-')}"
        export(model, case.recipe, bundles[name])
    rounds = measure_all(bundles, arguments.rounds, arguments.threads)
    rows = [row(name, folder, whole, rounds) for name, folder in bundles.items()]
    print_table(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")
    if arguments.texts:
        import compare_training

        compare_training.compare(arguments.texts, compare_training.STEPS)
    broken = [words for found in rows if found["name"] in wanted for words in misses(found, wanted[found["name"]])]
    if broken:
        raise SystemExit("not kept: " + "; ".join(broken))


def layers_of(model: Path) -> int:
    """The number of a model's layers."""
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def export(model: Path, recipe: str, bundle: Path) -> None:
    """Compress and export, unless an earlier run did. The gate of the export judges the result."""
    if (bundle / "manifest.json").is_file():
        return
    from edgelm.export import ExportConfig, export_model

    path = bundle.with_suffix(".toml")
    path.write_text(recipe, encoding="utf-8")
    print(f"exporting {bundle}", file=sys.stderr)
    export_model(ExportConfig(str(model), kv="int8", compress=str(path), out=bundle))


def measure_all(bundles: dict[str, Path], rounds: int, threads: int) -> list[dict[str, dict[str, float]]]:
    """What each round measured, by the bundles' names."""
    found = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        found.append({name: _in_process(folder, threads) for name, folder in bundles.items()})
    return found


def measure(bundle: Path, threads: int) -> dict[str, float]:
    """Decoding speed of a bundle at each context."""
    from edgelm.runtime.measure import measure_speed
    from edgelm.runtime.session import open_folder

    opened, session = open_folder(bundle, threads)
    ids = [7 * i % opened.manifest.model.vocab_size for i in range(max(CONTEXTS))]
    speeds = {str(context): measure_speed(session, ids[:context], repeats=2) for context in CONTEXTS}
    session.close()
    return {context: speed.decode_tokens_per_s for context, speed in speeds.items()}


def row(name: str, folder: Path, whole: Path, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The figures of a bundle beside those of the whole one, of the same rounds."""
    own, other = (_sizes(path) for path in (folder, whole))
    speeds = {str(c): statistics.median(found[name][str(c)] for found in rounds) for c in CONTEXTS}
    ratios = {
        str(c): statistics.median(found[name][str(c)] / found[UNCOMPRESSED][str(c)] for found in rounds)
        for c in CONTEXTS
    }
    return {
        "name": name,
        **own,
        "kv_ratio": own["kv_bytes_per_token"] / other["kv_bytes_per_token"],
        "decode_tokens_per_s": speeds,
        "decode_ratio": ratios,
    }


def misses(found: dict[str, Any], case: Case) -> list[str]:
    """The promises that a row does not keep, in words."""
    slow = [
        f"{found['name']}: {found['decode_ratio'][str(context)]:.2f} times the speed at {context}, not {least}"
        for context, least in case.least.items()
        if found["decode_ratio"][str(context)] < least
    ]
    large = [f"{found['name']}: {found['kv_ratio']:.3f} of the cache"] if found["kv_ratio"] > case.kv else []
    return slow + large


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a bundle."""
    print(f"{'':26}{'MB':>9}{'KV bytes/token':>17}" + "".join(f"{f'tokens/s at {c}':>26}" for c in CONTEXTS))
    for found in rows:
        speeds = [f"{found['decode_tokens_per_s'][str(c)]:.1f} ({found['decode_ratio'][str(c)]:.2f})" for c in CONTEXTS]
        size, cache = found["bytes"] / 1e6, found["kv_bytes_per_token"]
        print(f"{found['name']:26}{size:>9.1f}{cache:>17,}" + "".join(f"{speed:>26}" for speed in speeds))


def _sizes(folder: Path) -> dict[str, int]:
    from edgelm.runtime.bundle import Bundle
    from edgelm.runtime.kv import KVCache

    bundle = Bundle.open(folder)
    cache = KVCache(bundle.manifest.model).bytes_per_position()
    return {"bytes": bundle.total_bytes(), "kv_bytes_per_token": cache}


def _in_process(bundle: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", str(bundle), "--threads", str(threads)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


if __name__ == "__main__":
    main()
