"""The kernels' library for Windows computes what the one for this machine does. By Wine, with onnxruntime's Windows
build; skipped where Wine or the wheels are not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions import kernels

from .test_kernels import cases
from .test_wheels import unpacked

windows = pytest.importorskip("scripts.wheels.windows", reason="scripts/ is not here")
pytestmark = pytest.mark.skipif(windows.wine() is None, reason="Wine is not installed: Debian has it as wine64")

__all__ = ["cases"]  # a fixture


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("windows-x86_64", tmp_path_factory.mktemp("windows"))


def here(graph: Path, feeds: dict[str, np.ndarray], threads: int = 2) -> bytes:
    """The outputs of a graph with this machine's kernels."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    kernels.register(options, threads, True)
    found = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    return b"".join(array.tobytes() for array in found)


def test_operators_have_the_bits_of_this_machine(cases: Path, library: Path) -> None:
    for graph in sorted(cases.glob("*.onnx")):
        (inputs, *_) = sorted(cases.glob(f"{graph.stem}.*.npz"), reverse=True)
        with np.load(inputs) as feeds:
            given = dict(feeds)
        assert windows.compute(graph, given, library) == here(graph, given), graph.stem
