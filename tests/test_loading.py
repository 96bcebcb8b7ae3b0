"""How often a load reads the model's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.runtime.sessions import kernels

from .conftest import require_kernels

# Prints the bundle's files that Python opens during `load`, one a line. Files opened by onnxruntime are not seen.
OPENS = """
import pathlib, sys
from edgelm.runtime import load

folder = pathlib.Path(sys.argv[1])
sys.addaudithook(
    lambda event, found: print(pathlib.Path(found[0]).name)
    if event == "open" and isinstance(found[0], (str, pathlib.Path)) and pathlib.Path(found[0]).parent == folder
    else None
)
load(folder, threads=1)
"""


@pytest.mark.parametrize(("switch", "reads"), [("off", 1), ("on", 2)])
def test_a_load_checks_each_file_once_and_parses_the_graph_once(
    switch: str, reads: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.onnx is read for its digest, and with kernels also for its operators."""
    if switch == "on":
        require_kernels(monkeypatch)
    environment = {**os.environ, kernels.SWITCH: switch}
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(tiny_bundle)], capture_output=True, text=True, check=True, env=environment
    )
    opened = done.stdout.splitlines()
    assert opened.count("model.onnx") == reads
    assert opened.count("model.onnx.data") == 1
