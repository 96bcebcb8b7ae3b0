"""Kernels check what a graph gives them: no shape, input or number crashes the process or is read out of bounds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import hostile_graphs

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("edgelm_kernels") is None:
    pytest.skip("edgelm-kernels is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def said() -> dict[str, set[str]]:
    """The results of each graph on one thread and on several, with the operators' own threads and onnxruntime's. Runs
    in a process of its own, because a graph might crash it."""
    command = [sys.executable, "-m", "tests.hostile_graphs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        name, what = line.split("\t")
        found.setdefault(name, set()).add(what)
    return found


@pytest.mark.parametrize("case", list(hostile_graphs.cases()), ids=lambda case: case.name)
def test_a_graph_is_computed_or_refused(case: hostile_graphs.Case, said: dict[str, set[str]]) -> None:
    (what,) = said[case.name]
    if case.expected is None:
        assert what == "computed"
    else:
        assert what != "computed" and case.expected in what


# A step of many rows on two threads. The scratch memory of each thread exceeds the memory limit.
SHORT_OF_MEMORY = """
import resource, sys
import numpy as np
from tests import hostile_graphs as graphs
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions import kernels
import onnx_ir as ir

rows, own = 3000, sys.argv[1] == "own"
width, heads = 40 * 16, 36
model, feeds = graphs.attention(
    q=np.zeros((1, rows, width), np.float32), lengths=graphs.lengths(rows - 1), total=graphs.lengths(rows),
    cos=np.ones((rows, 8), np.float32), sin=np.ones((rows, 8), np.float32), attributes={"num_heads": heads},
)
options = load_onnxruntime().SessionOptions()
options.log_severity_level = 4
kernels.register(options, 2, own)
session = load_onnxruntime().InferenceSession(
    ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
)
short = dict(feeds, q=feeds["q"][:, :40], lengths=graphs.lengths(39), total=graphs.lengths(40))
session.run(None, short)
# What the operator gives needs 7 MB, what it computes in between 20.
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((used + int(sys.argv[2])) << 10, resource.RLIM_INFINITY))
try:
    session.run(None, feeds)
except Exception as error:
    print(str(error).splitlines()[0])
else:
    print("computed")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
session.run(None, feeds)
print("computed")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's memory limits")
@pytest.mark.parametrize("threads", ["own", "onnxruntime's"])
def test_an_operator_short_of_memory_is_an_error_and_computes_when_there_is_more(threads: str) -> None:
    said = []
    for limit in (7000, 9000):
        command = [sys.executable, "-c", SHORT_OF_MEMORY, threads.split("'", maxsplit=1)[0], str(limit)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        first, last = done.stdout.splitlines()
        said.append(first)
        assert last == "computed"
    assert any("not enough memory for what an operator computes" in first for first in said), said
