"""Where a step's time goes: operators with their provider from onnxruntime's profile, kernels from torch's.

python scripts/gpu/kernels.py BUNDLE RESULTS [--provider cuda]
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device import open_device, prompt, record

from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions.on_device import DeviceSession
from edgelm.runtime.sessions.providers import CPU, CUDA

_STEPS = 20
_MOST = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    kernels(lambda: None, 1)  # the profiler sees only graphs captured after its first use
    base = {"bundle": "/".join(arguments.bundle.parts[-2:]), "note": arguments.note}
    record(arguments.results, {**base, "operators": operators(arguments.bundle, arguments.provider)})
    bundle, session = open_device(arguments.bundle, arguments.provider)
    ids = prompt(1000, bundle.manifest.model.vocab_size)
    session.likeliest(ids)
    session.likeliest([1])

    def decode() -> None:
        for _ in range(_STEPS):
            session.likeliest([1])

    def prefill() -> None:
        session.rewind(0)
        session.likeliest(ids)

    if session.captures:
        record(arguments.results, {**base, "kernels": "captured step", **kernels(decode, _STEPS)})
    session.captures = False
    session.likeliest([1])
    record(arguments.results, {**base, "kernels": "step", **kernels(decode, _STEPS)})
    record(arguments.results, {**base, "kernels": "prompt of 1,000", **kernels(prefill, 1)})


def operators(folder: Path, provider: str) -> dict[str, Any]:
    """Microseconds and nodes of a step on the CPU's side, by provider and operator."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    bundle = Bundle.open(folder)
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        wanted = CUDA if provider == "cuda" else CPU
        inference = onnxruntime.InferenceSession(folder / GRAPH_NAME, options, providers=[wanted])
        session = DeviceSession(inference, False, bundle.manifest.model, "cuda" if provider == "cuda" else "cpu")
        session.likeliest(prompt(100, bundle.manifest.model.vocab_size))
        for _ in range(_STEPS):
            session.likeliest([1])
        events = json.loads(Path(inference.end_profiling()).read_text())
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = f"{event['args'].get('provider', '')[:4]} {event['args']['op_name']}"
            times[name] += event["dur"]
            counts[name] += 1
    runs = _STEPS + 1
    return {name: [round(total / runs, 1), round(counts[name] / runs, 1)] for name, total in times.most_common()}


def kernels(work: Callable[[], None], steps: int) -> dict[str, Any]:
    """GPU kernels from torch's profiler: microseconds a step, launches a step, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU

    started = time.perf_counter()
    work()
    alone = time.perf_counter() - started
    with profile(activities=[activity]) as profiler:
        work()
    rows = [(row.self_device_time_total, row.count, row.key) for row in profiler.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    longest = [[round(total / steps, 1), round(count / steps, 1), name[:110]] for total, count, name in rows[:_MOST]]
    return {
        "us_without_profiler": round(1e6 * alone / steps),
        "us_in_kernels": round(sum(row[0] for row in rows) / steps),
        "launches": round(sum(row[1] for row in rows) / steps),
        "longest": longest,
    }


if __name__ == "__main__":
    main()
