"""Speed of a bundle's steps, with and without CUDA graphs, and of prompts in pieces of several sizes.

    python scripts/gpu/speed.py BUNDLE RESULTS [--provider cuda] [--note TEXT] [--contexts ...] [--quick]

Appends JSON lines to RESULTS. onnxruntime's switches are read from the environment; --note says which are set.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import onnx
from device import open_device, prompt, record

from edgelm.runtime.bundle.folder import GRAPH_NAME
from edgelm.runtime.evaluation.speed import measure_speed, time_prompt
from edgelm.runtime.sessions.kv_cache import KVCache

_STEPS = 48
_PIECES = (256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--note", default="")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 1900])
    parser.add_argument("--quick", action="store_true", help="only captured steps and whole prompts")
    arguments = parser.parse_args()
    bundle, session = open_device(arguments.bundle, arguments.provider)
    vocabulary = bundle.manifest.model.vocab_size
    cached, weights = KVCache(bundle.manifest.model).bytes_per_position(), bytes_read(arguments.bundle)
    base = {"bundle": "/".join(arguments.bundle.parts[-2:]), "note": arguments.note}
    for captures in [True] if arguments.quick else [True, False]:
        if captures and not session.captures:
            record(arguments.results, {**base, "captured": "refused"})
            continue
        session.captures = captures
        for context in arguments.contexts:
            speed = measure_speed(session, prompt(context, vocabulary), _STEPS, 3)
            row = {"captured": captures, "context": context, "decode_tokens_per_s": round(speed.decode_tokens_per_s, 1)}
            row |= {"prefill_tokens_per_s": round(speed.prefill_tokens_per_s), "bytes": weights + context * cached}
            record(arguments.results, {**base, **row})
    if not arguments.quick:
        ids = prompt(arguments.contexts[-1], vocabulary)
        for piece in _PIECES:
            session.piece_tokens = piece
            seconds = statistics.median([time_prompt(session, ids) for _ in range(4)][1:])
            record(arguments.results, {**base, "piece": piece, "prefill_tokens_per_s": round(len(ids) / seconds)})
    session.close()


def bytes_read(folder: Path) -> int:
    """Bytes of weights for one token: everything except lookup tables."""
    graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    places = {tensor.name: {item.key: item.value for item in tensor.external_data} for tensor in graph.initializer}
    return sum(
        int(place["length"])
        for name, place in places.items()
        if place and any(not reader.startswith("Gather") for reader in readers.get(name, ()))
    )


if __name__ == "__main__":
    main()
