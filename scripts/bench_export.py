"""Measure the export of a large model: time and memory of each stage, relative to the size of the model's weights.

    python scripts/bench_export.py [--config scripts/reference/tinyllama.json | --model FOLDER] [--json FILE]

Builds a Llama model of TinyLlama-1.1B's sizes with random weights, stored as bfloat16 like most models, and exports it
in a fresh process. Memory is the peak resident memory, including mapped files. Time and memory do not depend on the
weights' values, but the choice of arithmetic does: `--model` exports an existing model.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reference_model import build_model, random_target

_CONFIG = Path(__file__).parent / "reference" / "tinyllama.json"
# Limits for an export, in units of the fp32 weights and of the source's files; the larger one applies.
_WEIGHTS_LIMIT, _FILES_LIMIT = 1.6, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=_CONFIG, help="config.json of the model (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model in place of one with random weights")
    parser.add_argument("--work", type=Path, default=Path("build/bench-export"), help="folder for model and bundle")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    arguments = parser.parse_args()
    if arguments.model is not None:
        report = measure(arguments.model, arguments.work / f"{arguments.model.name}-bundle", None)
    else:
        model = arguments.work / arguments.config.stem
        if not (model / "tokenizer.json").is_file():
            build_model(model, arguments.config, "bfloat16")
        report = measure(model, arguments.work / f"{model.name}-bundle", random_target(arguments.work))
    print_report(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(model: Path, bundle: Path, target: Path | None) -> dict[str, Any]:
    """Export once; returns the cost."""
    shutil.rmtree(bundle, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("edgelm")), "export", str(model), "--out", str(bundle)]
    command += [] if target is None else ["--target", str(target)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    parameters = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["model"]["parameters"]
    weights, files = 4 * parameters, sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {
        "parameters": parameters,
        "fp32_bytes": weights,
        "source_bytes": files,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "seconds": seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "limit_bytes": max(_WEIGHTS_LIMIT * weights, _FILES_LIMIT * files),
        "stages": report["stages"],
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    gib = 1 << 30
    print(f"{report['parameters'] / 1e6:,.0f} million parameters, {report['fp32_bytes'] / gib:.2f} GiB in float32,")
    print(f"{report['source_bytes'] / gib:.2f} GiB as stored, {report['bundle_bytes'] / gib:.2f} GiB as a bundle\n")
    for stage in report["stages"]:
        print(f"{stage['name']:<22}{stage['seconds']:>8.1f} s{stage['peak_bytes'] / gib:>8.2f} GiB")
    ratio = report["peak_bytes"] / report["fp32_bytes"]
    print(f"{'in all':<22}{report['seconds']:>8.1f} s{report['peak_bytes'] / gib:>8.2f} GiB")
    print(f"\npeak: {ratio:.2f} times the fp32 weights, limit {report['limit_bytes'] / gib:.2f} GiB")


if __name__ == "__main__":
    main()
