"""Compare compressed bundles with the uncompressed one, on the reference model of `scripts/bench.py`.

    python scripts/compare_recipes.py [--work build/bench] [--rounds 5] [--threads 2] [--texts FOLDER] [--json FILE]

Each bundle is INT8 and passed the gate of its export; bundles with the same type of cache are compared. A round
measures each bundle in a fresh process, every second round in the opposite order. The table shows medians over the
rounds, with the smallest and largest ratio of a round. (In one process, in turns, waiting threads of other sessions
take the processor: a saving of a fifth in separate processes then disappeared.)

The reference has random weights, which affect neither size nor speed. The cost of steps in quality, and the effect of
training, are compared on a trained model by `compare_training.py`; its table follows if --texts names its texts.
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

from given import existing_folder
from reference_model import prepare, random_target

CONTEXTS = (128, 1900)
CACHES = ("int8", "float32")
UNCOMPRESSED = "uncompressed"
# Timed steps, and untimed ones before them.
_STEPS, _SETTLING = 150, 10

# Seconds of a step, by bundle and context.
Round = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A recipe as text; least: the smallest promised ratio of decoding speed at each context, with an INT8 cache; kv:
    the promised share of the cache's bytes; caches: the types of cache to compare with."""

    recipe: str
    least: dict[int, float]
    kv: float
    caches: tuple[str, ...] = ("int8",)


def cases(layers: int) -> dict[str, Case]:
    """The cases for a model of so many layers."""
    return {
        # A float32 cache too: there, attention takes a larger part of a step.
        "skip half of attention": Case(
            f'[[step]]\nuse = "skip-attention"\nlast = {layers // 2}\n', {128: 1.15, 1900: 1.35}, 0.5, CACHES
        ),
        "drop a third of layers": Case(f'[[step]]\nuse = "drop-layers"\nlast = {layers // 3}\n', {128: 1.35}, 2 / 3),
    }


def main() -> None:
    """Parse, then measure everything, or one round in a child process. Exit status 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench"), help="folder for models and bundles, kept for the next run"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of every bundle (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    parser.add_argument(
        "--texts", type=existing_folder, metavar="FOLDER", help="also compare training steps on these texts"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.threads)))
        return
    model = arguments.work / "model"
    exported = {kv: export_all(arguments.work, model, kv) for kv in CACHES}
    rows, rounds, broken = [], {}, []
    for kv, (bundles, wanted) in exported.items():
        rounds[kv] = measure_all(bundles, arguments.rounds, arguments.threads)
        found = [row(name, kv, bundles, rounds[kv]) for name in bundles]
        rows += found
        broken += [words for one in found if one["name"] in wanted for words in misses(one, wanted[one["name"]])]
    print_table(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")
    if arguments.texts:
        import compare_training

        compare_training.compare(arguments.texts, compare_training.STEPS)
    if broken:
        raise SystemExit("not kept: " + "; ".join(broken))


def layers_of(model: Path) -> int:
    """The number of a model's layers."""
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def export_all(work: Path, model: Path, kv: str) -> tuple[dict[str, Path], dict[str, Case]]:
    """The bundles with this type of cache by name, the uncompressed one first, and their cases."""
    bundles = {UNCOMPRESSED: work / f"bundle-{kv}"}
    prepare(model, bundles[UNCOMPRESSED], kv)
    wanted = {name: case for name, case in cases(layers_of(model)).items() if kv in case.caches}
    for name, case in wanted.items():
        bundles[name] = work / f"compressed-{name.replace(' ', '-')}-{kv}"
        export(model, case.recipe, bundles[name], kv)
    return bundles, wanted


def export(model: Path, recipe: str, bundle: Path, kv: str) -> None:
    """Compress and export, unless an earlier run did. The export's gate judges the result."""
    if (bundle / "manifest.json").is_file():
        return
    from edgelm.export import ExportConfig, export_model

    path = bundle.with_suffix(".toml")
    path.write_text(recipe, encoding="utf-8")
    print(f"exporting {bundle}", file=sys.stderr)
    target = str(random_target(bundle.parent))
    export_model(ExportConfig(str(model), target=target, kv=kv, compress=str(path), out=bundle))


def measure_all(bundles: dict[str, Path], rounds: int, threads: int) -> list[Round]:
    """The measurements of each round."""
    found = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        names = list(bundles)[:: -1 if number % 2 else 1]
        found.append({name: _in_process(bundles[name], threads) for name in names})
    return found


def measure(bundle: Path, threads: int) -> dict[str, float]:
    """Seconds of a step at each context, the median of many."""
    from edgelm.runtime.evaluation.speed import time_prompt, time_step
    from edgelm.runtime.sessions.loading import open_folder

    opened, session = open_folder(bundle, threads)
    ids = [7 * i % opened.manifest.model.vocab_size for i in range(max(CONTEXTS))]
    found = {}
    for context in CONTEXTS:
        time_prompt(session, ids[:context])
        times = [time_step(session, ids[:context]) for _ in range(_SETTLING + _STEPS)]
        found[str(context)] = statistics.median(times[_SETTLING:])
    session.close()
    return found


def row(name: str, kv: str, bundles: dict[str, Path], rounds: list[Round]) -> dict[str, Any]:
    """The figures of a bundle beside the uncompressed one's with the same type of cache."""
    own, other = (_sizes(bundles[one]) for one in (name, UNCOMPRESSED))
    ratios = {str(c): [found[UNCOMPRESSED][str(c)] / found[name][str(c)] for found in rounds] for c in CONTEXTS}
    return {
        "name": name,
        "kv": kv,
        **own,
        "kv_ratio": own["kv_bytes_per_token"] / other["kv_bytes_per_token"],
        "decode_tokens_per_s": {
            str(c): 1 / statistics.median(found[name][str(c)] for found in rounds) for c in CONTEXTS
        },
        "decode_ratio": {context: statistics.median(values) for context, values in ratios.items()},
        "decode_ratio_from_to": {context: [min(values), max(values)] for context, values in ratios.items()},
    }


def misses(found: dict[str, Any], case: Case) -> list[str]:
    """The promises that a row does not keep, as texts."""
    least = case.least if found["kv"] == "int8" else {}
    slow = [
        f"{found['name']}: {found['decode_ratio'][str(context)]:.2f} times the speed at {context}, not {ratio}"
        for context, ratio in least.items()
        if found["decode_ratio"][str(context)] < ratio
    ]
    large = [f"{found['name']}: {found['kv_ratio']:.3f} of the cache"] if found["kv_ratio"] > case.kv else []
    return slow + large


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line a bundle."""
    print(
        f"{'':26}{'cache':>9}{'MB':>8}{'KV bytes/token':>16}" + "".join(f"{f'tokens/s at {c}':>28}" for c in CONTEXTS)
    )
    for found in rows:
        size, cache = found["bytes"] / 1e6, found["kv_bytes_per_token"]
        speeds = "".join(f"{_speed(found, str(context)):>28}" for context in CONTEXTS)
        print(f"{found['name']:26}{found['kv']:>9}{size:>8.1f}{cache:>16,}{speeds}")


def _speed(found: dict[str, Any], context: str) -> str:
    speed, ratio = found["decode_tokens_per_s"][context], found["decode_ratio"][context]
    if found["name"] == UNCOMPRESSED:
        return f"{speed:.1f}"
    low, high = found["decode_ratio_from_to"][context]
    return f"{speed:.1f} ({ratio:.2f}; {low:.2f}-{high:.2f})"


def _sizes(folder: Path) -> dict[str, int]:
    from edgelm.runtime.bundle.folder import Bundle
    from edgelm.runtime.sessions.kv_cache import KVCache

    bundle = Bundle.open(folder)
    cache = KVCache(bundle.manifest.model).bytes_per_position()
    return {"bytes": bundle.total_bytes(), "kv_bytes_per_token": cache}


def _in_process(bundle: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--worker", str(bundle)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


if __name__ == "__main__":
    main()
