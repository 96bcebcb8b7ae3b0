"""`edgelm doctor`: what this machine is, which target fits, what will be fast, what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ..bundle.figures import bytes_text, count_text, speed_text
from ..host.bandwidth import read_bytes_per_s
from .diagnosis import Diagnosis, diagnose
from .expectation import COMFORTABLE_TOKENS_PER_S, Expectation, comfortable_parameters, expect, largest_parameters

SUMMARY = "say what this machine can do and what is missing"
_GB = 1e9
_KIB = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "bundle", nargs="*", help="bundles whose speed to estimate: this measures the memory's speed, for two seconds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, measure if bundles are given, and print. Advice is no failure; a fault that stops every model is."""
    found = diagnose()
    faults = [*filter(None, [found.onnxruntime_fault, found.kernels_fault])]
    status = 1 if faults else 0
    speed = read_bytes_per_s(found.threads) if arguments.bundle else None
    expected = [] if speed is None else [expect(bundle, found, speed) for bundle in arguments.bundle]
    if arguments.json:
        more = {"memory_bytes_per_s": speed, "expected": [dataclasses.asdict(bundle) for bundle in expected]}
        print(json.dumps({**dataclasses.asdict(found), **more}))
        return status
    for name, value in [*_lines(found), *([] if speed is None else _expected(found, speed, expected))]:
        print(f"{name:14}{value}")
    sentences = [*faults, *found.advice]
    for sentence in sentences:
        print(f"\n- {sentence}", end="")
    print("\n" if sentences else "\nNothing is missing.")
    return status


def _lines(found: Diagnosis) -> list[tuple[str, str]]:
    free = "" if found.home_free_bytes is None else f", {found.home_free_bytes / _GB:,.1f} GB free"
    extras = ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in found.extras.items())
    extras = extras or "none (a frozen program takes no more)"
    without = "onnxruntime's own" if found.kernels_fault is None else "installed, but cannot be used"
    largest = largest_parameters(found)
    board = [] if found.board is None else [("board", f"{found.board}, pages of {found.page_bytes // _KIB} KiB")]
    return [
        ("system", found.system),
        *board,
        ("processor", f"{found.processor}, {found.threads} threads"),
        ("INT8", f"{found.int8}; {' '.join(found.instruction_sets) or 'no telling instruction sets'}"),
        ("kernels", found.kernels or without),
        ("memory", f"{found.available_bytes / _GB:,.1f} GB free of {found.memory_bytes / _GB:,.1f} GB"),
        (
            "models",
            f"up to about {largest / 1e9:,.1f} billion parameters in INT8 fit into the free memory, without cache",
        ),
        ("target", f"edgelm export MODEL --target {found.target}" if found.target else "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("providers", ", ".join(found.providers)),
        ("extras", extras),
        ("caches", f"{found.home or 'none'}{free}"),
    ]


def _expected(found: Diagnosis, speed: float, bundles: list[Expectation]) -> list[tuple[str, str]]:
    """The measured speed of the memory, and what it means for the given bundles and for models in general."""
    comfortable = count_text(comfortable_parameters(found, speed))
    lines = [
        ("reading", f"{speed / _GB:,.1f} GB/s of memory, by {found.threads} threads"),
        ("speed", f"{COMFORTABLE_TOKENS_PER_S} tokens/s with models of up to about {comfortable} parameters in INT8"),
    ]
    return [*lines, *(("bundle", _expectation(bundle)) for bundle in bundles)]


def _expectation(bundle: Expectation) -> str:
    most, usual = speed_text(bundle.most_tokens_per_s), speed_text(bundle.usual_tokens_per_s)
    size, room = bytes_text(bundle.bytes_a_token), "fits" if bundle.fits else "does not fit"
    return (
        f"{bundle.bundle} {room} into the free memory; at most {most}, each of which reads {size}; about {usual} are "
        "usual, fewer below 50 MB"
    )
