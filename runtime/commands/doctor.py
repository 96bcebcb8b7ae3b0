"""`edgelm doctor`: what this machine is, which target fits, what will be fast, what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json

from .diagnosis import Diagnosis, diagnose

SUMMARY = "say what this machine can do and what is missing"
_GB = 1e9
# What was resident at most, the KV cache not counted: weights, and without kernels the copies that onnxruntime makes of
# them while it loads. Kernels compute with the weights as they are in the file.
_BYTES_A_PARAMETER, _BYTES_WITH_KERNELS = 2.6, 1.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look and print. Advice is not a failure; kernels that stop every model are."""
    found = diagnose()
    status = 0 if found.kernels_fault is None else 1
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found)))
        return status
    for name, value in _lines(found):
        print(f"{name:14}{value}")
    sentences = [*filter(None, [found.kernels_fault]), *found.advice]
    for sentence in sentences:
        print(f"\n- {sentence}", end="")
    print("\n" if sentences else "\nNothing is missing.")
    return status


def _lines(found: Diagnosis) -> list[tuple[str, str]]:
    free = "" if found.home_free_bytes is None else f", {found.home_free_bytes / _GB:,.1f} GB free"
    extras = ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in found.extras.items())
    without = "onnxruntime's own" if found.kernels_fault is None else "installed, but cannot be used"
    largest = found.available_bytes / (_BYTES_WITH_KERNELS if found.kernels else _BYTES_A_PARAMETER)
    return [
        ("system", found.system),
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
