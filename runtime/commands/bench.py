"""`edgelm bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from ..errors import SettingsError
from ..evaluation.speed import Speed, measure_speed
from ..host import machine
from ..sessions.loading import open_folder
from .folder import add_folder, add_provider

SUMMARY = "measure a bundle on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_folder(parser)
    add_provider(parser)
    parser.add_argument(
        "--context", type=int, nargs="+", metavar="N", help="lengths of prompts (128 1024 1900, those that fit)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs of each length; the median is shown (%(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print."""
    if arguments.repeats < 1:
        raise SettingsError(f"--repeats must be 1 or more, found {arguments.repeats}")
    started = time.perf_counter()
    bundle, session = open_folder(arguments.bundle, arguments.threads, arguments.graph, provider=arguments.provider)
    load_s = time.perf_counter() - started
    model = bundle.manifest.model
    lengths = _lengths(arguments.context, model.context_length)
    # Any ids will do: speed does not depend on them.
    speeds = [
        measure_speed(session, [i % model.vocab_size for i in range(n)], repeats=arguments.repeats) for n in lengths
    ]
    resident = machine.resident_bytes()
    figures = {
        "load_s": load_s,
        "resident_bytes": resident,
        "bundle_bytes": bundle.total_bytes(),
        "threads": arguments.threads or machine.default_threads(),
        "speed": [_as_data(speed) for speed in speeds],
    }
    if arguments.json:
        print(json.dumps(figures))
        return 0
    print(
        f"load {load_s:.2f} s, resident {resident / 1e6:.0f} MB, "
        f"bundle {bundle.total_bytes() / 1e6:.1f} MB, {figures['threads']} threads"
    )
    print(f"{'context':>10}{'prefill tokens/s':>20}{'decode tokens/s':>20}")
    for speed in speeds:
        print(f"{speed.prompt_tokens:>10,}{speed.prefill_tokens_per_s:>20,.1f}{speed.decode_tokens_per_s:>20,.1f}")
    return 0


def _as_data(speed: Speed) -> dict[str, float]:
    rates = {"prefill_tokens_per_s": speed.prefill_tokens_per_s, "decode_tokens_per_s": speed.decode_tokens_per_s}
    return {**dataclasses.asdict(speed), **rates}


def _lengths(asked: list[int] | None, context: int) -> list[int]:
    if asked is None:
        return [n for n in (128, 1024, 1900) if n < context] or [context - 1]
    for n in asked:
        if not 1 <= n < context:
            raise SettingsError(f"--context must be 1 to {context - 1} for this bundle, found {n}")
    return asked
