"""Measure a bundle for the cuda target against transformers on the same GPU, and against the memory's limit.

    python scripts/bench_cuda.py MODEL BUNDLE [--contexts 128 1024 1900] [--repeats 5] [--json FILE]

MODEL: folder or hub id that BUNDLE was exported from. Decoding reads every weight and the whole cache once per token,
so the memory's speed limits it; that speed is measured by copying. Needs onnxruntime-gpu and a torch with CUDA; without
them it says what is missing and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_CUDA = "CUDAExecutionProvider"
_DECODE_TOKENS = 64
_COPY_BYTES = 1 << 30
_COPIES = 20


def main() -> int:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id that the bundle was exported from")
    parser.add_argument("bundle", type=Path, help="folder that  edgelm export --target cuda  wrote")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 1900], help="prompt lengths, in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, the median counts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    arguments = parser.parse_args()
    missing = what_is_missing()
    if missing is not None:
        print(f"bench_cuda.py: {missing}: nothing was measured", file=sys.stderr)
        return 1
    report = measure(arguments)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def what_is_missing() -> str | None:
    """Return the reason why nothing can be measured, or None."""
    from edgelm.runtime.host.ort import can_start

    if not can_start(_CUDA):
        return (
            f"onnxruntime starts no {_CUDA}: install onnxruntime-gpu in place of onnxruntime, on a machine with a GPU"
        )
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: install a build of torch for CUDA"
    return None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, one system after the other, so that each has the GPU's memory to itself."""
    import onnxruntime
    import torch

    bandwidth = memory_bandwidth()
    edgelm = measure_edgelm(arguments.bundle, arguments.contexts, arguments.repeats)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "memory_bytes_per_s": bandwidth,
        "edgelm": [{**row, "most_tokens_per_s": bandwidth / row["bytes_per_token"]} for row in edgelm],
        "transformers": measure_transformers(arguments.model, arguments.contexts, arguments.repeats),
    }


def memory_bandwidth() -> float:
    """Bytes per second that a copy within the GPU reads and writes."""
    import torch

    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source)
    torch.cuda.synchronize()
    return 2 * _COPY_BYTES * _COPIES / (time.perf_counter() - started)


def measure_edgelm(bundle: Path, contexts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Prefill and greedy decoding for each length, with the bytes read per token."""
    from edgelm.runtime.evaluation.speed import measure_speed
    from edgelm.runtime.sessions.kv_cache import KVCache
    from edgelm.runtime.sessions.loading import open_folder

    opened, session = open_folder(bundle, provider="cuda")
    manifest = opened.manifest
    weights = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(".data"))
    cached = KVCache(manifest.model).bytes_per_position()
    rows = []
    for context in contexts:
        ids = [index % manifest.model.vocab_size for index in range(context)]
        speed = measure_speed(session, ids, _DECODE_TOKENS, repeats)
        rows.append(_row(context, speed.prefill_s, speed.step_s) | {"bytes_per_token": weights + context * cached})
    session.close()
    return rows


def measure_transformers(model: str, contexts: list[int], repeats: int) -> list[dict[str, Any]]:
    """The same with transformers in float16 on the same GPU, with its own growing cache."""
    import torch
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).to("cuda").eval()
    rows = []
    for context in contexts:
        ids = (torch.arange(context, device="cuda") % module.config.vocab_size)[None]
        runs = [_transformers_run(module, ids) for _ in range(repeats + 1)][1:]
        rows.append(_row(context, *(statistics.median(run[index] for run in runs) for index in (0, 1))))
    return rows


def _transformers_run(module: Any, ids: Any) -> tuple[float, float]:
    import torch

    with torch.inference_mode():
        _finish(ids)
        started = time.perf_counter()
        out = module(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        _finish(ids)
        prefill, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(_DECODE_TOKENS):
            out = module(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.item()
        return prefill, (time.perf_counter() - started) / _DECODE_TOKENS


def _finish(ids: Any) -> None:
    """Wait for the GPU if the ids are on it."""
    import torch

    if ids.is_cuda:
        torch.cuda.synchronize()


def _row(context: int, prefill_s: float, step_s: float) -> dict[str, Any]:
    return {
        "context": context,
        "first_token_s": prefill_s,
        "prefill_tokens_per_s": context / prefill_s,
        "decode_tokens_per_s": 1 / step_s,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print a line for each length, with the ratio of both systems and the share of the memory's speed."""
    speed = report["memory_bytes_per_s"] / 1e9
    print(f"{report['gpu']}, {speed:,.0f} GB/s, onnxruntime {report['onnxruntime']}, torch {report['torch']}")
    titles = ("context", "prefill", "transformers", "decode", "transformers", "most by memory")
    print("".join(f"{title:>16}" for title in titles))
    for ours, theirs in zip(report["edgelm"], report["transformers"], strict=True):
        figures = (
            ours["prefill_tokens_per_s"],
            theirs["prefill_tokens_per_s"],
            ours["decode_tokens_per_s"],
            theirs["decode_tokens_per_s"],
            ours["most_tokens_per_s"],
        )
        print(f"{ours['context']:>16,}" + "".join(f"{figure:>16,.1f}" for figure in figures))
    print("all in tokens per second")


if __name__ == "__main__":
    sys.exit(main())
