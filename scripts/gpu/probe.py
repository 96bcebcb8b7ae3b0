"""Show what is installed, and whether onnxruntime actually computes on the GPU.

python scripts/gpu/probe.py RESULTS [--provider cuda]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

from device import record

from edgelm.runtime.host.ort import can_start, load_onnxruntime
from edgelm.runtime.sessions.providers import CPU, CUDA, gpu_names

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "numpy", "edgelm", "nvidia-cublas", "nvidia-cuda-runtime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--provider", default="cuda")
    arguments = parser.parse_args()
    onnxruntime = load_onnxruntime()
    wanted = CUDA if arguments.provider == "cuda" else CPU
    starts = can_start(wanted)
    found = {"onnxruntime": onnxruntime.__version__, "gpus": list(gpu_names()), "python": sys.version.split()[0]}
    record(arguments.results, {**found, "provider": wanted, "starts": starts, "packages": _versions()})
    if not starts:
        onnxruntime.set_default_logger_severity(0)
        identity = bytes.fromhex(
            "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a"
            "08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
        )
        onnxruntime.InferenceSession(identity, providers=[wanted])  # its log says why it does not start
    return 0 if starts else 1


def _versions() -> dict[str, str]:
    installed = {item.name: item.version for item in importlib.metadata.distributions()}
    return {name: installed.get(name, "missing") for name in _PACKAGES}


if __name__ == "__main__":
    sys.exit(main())
