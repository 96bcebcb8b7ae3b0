"""Measure edgelm against transformers on the reference model: Llama with SmolLM2-135M's sizes and random weights.

    python scripts/bench.py [--shape llama | --model FOLDER] [--work build/bench] [--rounds 5] [--json FILE]

Other shapes: `gemma3` (270M parameters, a vocabulary of 262,144, heads of 256 values, norms after layers and of
queries and keys, GELU gates) and `qwen3` (as wide as its 0.6B, 12 layers, norms of queries and keys).
Builds the model from its configuration in `scripts/reference` and exports it. Measures both systems in alternation,
each round in fresh processes, and prints medians and the medians of each round's ratio. `weights_read_share` is the
speed at which decoding reads the weights, as a share of the memory's speed. Weights' values affect speed only through
the arithmetic that the export chooses: with random weights all activations have 16 bits, nearly as in a real model's
bundle. `--model` measures an existing model, such as the one of scripts/real_model.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from given import existing_folder
from reference_model import SHAPES, export, prepare

CONTEXTS = (128, 1024, 1900)
DECODE_TOKENS = 64
# For the comparison of decoding with reading memory.
TURNS, PASSES = 15, 16


def main() -> None:
    """Parse, then measure everything, or one system in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench"), help="folder for model and bundle, kept for the next run"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each system, in alternation (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each system (%(default)s)")
    parser.add_argument(
        "--kv", default="int8", choices=("int8", "float32"), help="KV cache of the bundle (%(default)s)"
    )
    parser.add_argument("--shape", default="llama", choices=SHAPES, help="shape of the model (%(default)s)")
    parser.add_argument(
        "--model", type=existing_folder, metavar="FOLDER", help="a model in place of one with random weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    parser.add_argument("--worker", choices=sorted(_WORKERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    name = arguments.model.name if arguments.model is not None else arguments.shape
    work = arguments.work if name == "llama" else arguments.work / name
    bundle, model = work / f"bundle-{arguments.kv}", arguments.model or work / "model"
    if arguments.worker:
        print(
            json.dumps(_WORKERS[arguments.worker](bundle if arguments.worker == "edgelm" else model, arguments.threads))
        )
        return
    if arguments.model is not None:
        export(model, bundle, arguments.kv)
    else:
        prepare(model, bundle, arguments.kv, SHAPES[arguments.shape])
    rounds = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        rounds.append(
            {name: _in_process(name, arguments) for name in _WORKERS} | {"command": _command(bundle, arguments.threads)}
        )
    report = {"shape": name, **summarize(rounds, bundle)}
    print_report(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _in_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--work", str(arguments.work)]
    command += ["--threads", str(arguments.threads), "--kv", arguments.kv, "--shape", arguments.shape]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def _command(bundle: Path, threads: int) -> dict[str, float]:
    """`edgelm run` as a user starts it: from process start to the first character of the answer."""
    command = [
        str(Path(sys.executable).with_name("edgelm")),
        "run",
        str(bundle),
        "the quick brown fox",
        "--raw",
        "--max-tokens",
        "8",
    ]
    started = time.perf_counter()
    with subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "stdout is a pipe"
        if not process.stdout.read(1):
            raise SystemExit("edgelm run gave no answer")
        seconds = time.perf_counter() - started
        process.stdout.read()
    return {"first_token_s": seconds}


def _ids(count: int) -> list[int]:
    return [1000 + 7 * i % 40000 for i in range(count)]


def _work_edgelm(bundle: Path, threads: int) -> dict[str, Any]:
    from edgelm.runtime import load

    started = time.perf_counter()
    engine = load(bundle, threads=threads, response_cache=False, prefix_cache=False)
    figures: dict[str, Any] = {"load_s": time.perf_counter() - started}
    inside = _clock_of(engine)
    engine.generate(token_ids=_ids(16), max_tokens=4)
    for context in CONTEXTS:
        firsts, rates, shares = [], [], []
        for repeat in range(3):
            inside.clear()
            # The first token differs each time, so that nothing is reused from an earlier prompt.
            done = engine.generate(token_ids=[repeat, *_ids(context - 1)], max_tokens=DECODE_TOKENS)
            assert done.stats.reused_tokens == 0 and done.stats.generated_tokens == DECODE_TOKENS
            firsts.append(done.stats.time_to_first_token_s)
            rates.append(done.stats.decode_tokens_per_s)
            decoding = (DECODE_TOKENS - 1) / done.stats.decode_tokens_per_s
            shares.append(1 - sum(inside[-(DECODE_TOKENS - 1) :]) / decoding)
        figures[f"first_token_s_{context}"] = statistics.median(firsts)
        figures[f"decode_tokens_per_s_{context}"] = statistics.median(rates)
        figures[f"python_share_{context}"] = statistics.median(shares)
        figures[f"resident_mb_{context}"] = done.stats.resident_bytes / 1e6
    figures |= _weights_read(engine, (bundle / "model.onnx.data").stat().st_size, threads)
    engine.close()
    return figures


def _weights_read(engine: Any, size: int, threads: int) -> dict[str, float]:
    """The speed at which decoding reads weights of `size` bytes, as a share of the memory's speed, on the shortest
    context. A step reads each weight once. Both speeds are averages over about 0.2 s, in alternation because other
    processes use the memory too. Returns medians."""
    import numpy as np

    parts = [np.ones(1 << 25, np.int64) for _ in range(threads)]
    speeds, shares = [], []
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(TURNS):
            done = engine.generate(token_ids=[100 + turn, *_ids(CONTEXTS[0] - 1)], max_tokens=DECODE_TOKENS)
            speeds.append(_reading(pool, parts))
            shares.append(size * done.stats.decode_tokens_per_s / speeds[-1])
    return {"memory_gb_per_s": statistics.median(speeds) / 1e9, "weights_read_share": statistics.median(shares)}


def _reading(pool: ThreadPoolExecutor, parts: list[Any]) -> float:
    """Bytes per second that the threads of a pool read together, from arrays larger than the processor's caches."""
    started = time.perf_counter()
    for _ in range(PASSES):
        list(pool.map(type(parts[0]).max, parts))  # numpy releases the GIL
    return float(PASSES * sum(part.nbytes for part in parts)) / (time.perf_counter() - started)


def _clock_of(engine: Any) -> list[float]:
    """Make each onnxruntime call of the engine append its seconds to a list."""
    inference, seconds = engine._session._inference, []
    compute = inference.run_with_iobinding

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        compute(*arguments)
        seconds.append(time.perf_counter() - started)

    inference.run_with_iobinding = timed
    return seconds


def _work_transformers(model: Path, threads: int) -> dict[str, Any]:
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    started = time.perf_counter()
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    figures: dict[str, Any] = {"load_s": time.perf_counter() - started}
    with torch.inference_mode():
        _torch_decode(module, _ids(16), 4)
        for context in CONTEXTS:
            runs = [_torch_decode(module, [repeat, *_ids(context - 1)], DECODE_TOKENS) for repeat in range(3)]
            figures[f"first_token_s_{context}"] = statistics.median(first for first, _ in runs)
            figures[f"decode_tokens_per_s_{context}"] = statistics.median(rate for _, rate in runs)
            figures[f"resident_mb_{context}"] = psutil.Process().memory_info().rss / 1e6
    return figures


def _torch_decode(module: Any, ids: list[int], count: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it, of a plain greedy loop (faster than `generate`)."""
    import torch

    started = time.perf_counter()
    step, cache, first = torch.tensor([ids]), None, 0.0
    for _ in range(count):
        output = module(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        step.item()
        first = first or time.perf_counter()
    return first - started, (count - 1) / (time.perf_counter() - first)


_WORKERS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "edgelm": _work_edgelm,
    "transformers": _work_transformers,
}


def summarize(rounds: list[dict[str, dict[str, Any]]], bundle: Path) -> dict[str, Any]:
    """Medians of each system's figures, and of each round's ratio edgelm / transformers for figures of both."""
    systems = {name: _medians([one[name] for one in rounds]) for name in rounds[0]}
    both = [key for key in systems["edgelm"] if key in systems["transformers"]]
    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("edgelm", "onnxruntime", "torch", "transformers")},
        "rounds": len(rounds),
        "file_mb": sum(path.stat().st_size for path in bundle.glob("model.onnx*")) / 1e6,
        "bundle_mb": sum(path.stat().st_size for path in bundle.iterdir()) / 1e6,
        "medians": systems,
        "ratios": {
            key: statistics.median(one["edgelm"][key] / one["transformers"][key] for one in rounds) for key in both
        },
        "all": rounds,
    }


def _medians(figures: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in figures) for key in figures[0]}


def print_report(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(
        f"\nmodel of {report['shape']}'s shape, {report['rounds']} rounds, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    )
    print(f"{'':28}{'edgelm':>12}{'transformers':>15}{'ratio':>9}")
    edgelm, torch = report["medians"]["edgelm"], report["medians"]["transformers"]
    for key, value in edgelm.items():
        other = f"{torch[key]:>15,.3f}{report['ratios'][key]:>9.2f}" if key in torch else ""
        print(f"{key:28}{value:>12,.3f}{other}")
    print(f"{'edgelm run, first token s':28}{report['medians']['command']['first_token_s']:>12.3f}")
    print(f"{'model files MB':28}{report['file_mb']:>12.1f}\n{'bundle MB':28}{report['bundle_mb']:>12.1f}")


if __name__ == "__main__":
    main()
