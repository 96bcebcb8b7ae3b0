"""Speed of transformers on the same GPU, in float16 with random weights, plain and with compiled steps.

python scripts/gpu/torch_speed.py CONFIG RESULTS [--device cuda] [--compiled] [--contexts ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from device import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_cuda import _transformers_run, memory_bandwidth

_STEPS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 1900])
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not arguments.compiled:
        record(arguments.results, {"memory_bytes_per_s": round(memory_bandwidth())})
    config = transformers.AutoConfig.from_pretrained(arguments.config)
    with torch.device(arguments.device):
        module: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    base = {"torch": torch.__version__, "transformers": transformers.__version__, "model": arguments.config.stem}
    for context in arguments.contexts:
        ids = (torch.arange(context, device=arguments.device) * 7919 % config.vocab_size)[None]
        row = compiled(module, ids) if arguments.compiled else eager(module, ids)
        record(arguments.results, {**base, "compiled": arguments.compiled, "context": context, **row})


def eager(module: Any, ids: Any) -> dict[str, Any]:
    runs = [_transformers_run(module, ids) for _ in range(4)][1:]
    prefill, step = (statistics.median(run[index] for run in runs) for index in (0, 1))
    return {"prefill_tokens_per_s": round(ids.shape[1] / prefill), "decode_tokens_per_s": round(1 / step, 1)}


def compiled(module: Any, ids: Any) -> dict[str, Any]:
    """`generate` with a cache of fixed size, which compiles the step on a GPU: the time of 48 more tokens."""
    cache = transformers.StaticCache(config=module.config, max_cache_len=2048)
    few, many = 8, 8 + _STEPS
    times: dict[int, list[float]] = {few: [], many: []}
    for count in [many] * 3 + [few, many] * 4:
        cache.reset()
        if ids.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        module.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, past_key_values=cache)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times[count].append(time.perf_counter() - started)
    step = (statistics.median(times[many][-4:]) - statistics.median(times[few])) / _STEPS
    return {"decode_tokens_per_s": round(1 / step, 1), "first_runs_s": [round(item, 2) for item in times[many][:3]]}


if __name__ == "__main__":
    main()
