"""Boards with little memory: the memory of a fresh process from loading a bundle to the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .test_reference import _bench

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# This process's own peak; ru_maxrss would include the peak of the process that started it.
CHILD = """
import json, resource, sys
bundle, limit = sys.argv[1], int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from edgelm.runtime import load
with load(bundle, threads=2, response_cache=False, prefix_cache=False) as engine:
    chunks = engine.stream(token_ids=[7 * i % 200 for i in range(32)], max_tokens=8)
    first = next(chunks)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    count = 1 + sum(1 for _ in chunks)
print(json.dumps({"peak": int(peak.split()[1]) * 1024, "chunks": count}))
"""


def start(bundle: Path, limit: int = 0, kernels: str = "off") -> dict[str, int]:
    """The peak memory of a fresh process at the first token, in bytes. limit: on its writable memory, 0 for none."""
    command = [sys.executable, "-c", CHILD, str(bundle), str(limit)]
    environment = {**os.environ, "EDGELM_KERNELS": kernels}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def size(bundle: Path) -> int:
    return sum(file.stat().st_size for file in bundle.iterdir())


def test_little_memory_is_used_beyond_the_model(tiny_bundle: Path) -> None:
    """An import that a start must avoid, such as torch, would exceed this."""
    assert start(tiny_bundle)["peak"] <= size(tiny_bundle) + 90e6


def test_a_limit_that_is_too_small_has_an_effect(tiny_bundle: Path) -> None:
    """Otherwise the limit in the next test would prove nothing."""
    command = [sys.executable, "-c", CHILD, str(tiny_bundle), str(30_000_000)]
    assert subprocess.run(command, env=os.environ, capture_output=True, check=False).returncode != 0


@pytest.fixture
def reference() -> Path:
    work = ROOT / "build" / "bench"
    _bench().prepare(work / "model", work / "bundle-int8", "int8")
    return work / "bundle-int8"


@pytest.mark.slow
def test_the_reference_model_fits_a_board_of_512_mb(reference: Path) -> None:
    """RLIMIT_DATA counts all writable memory, touched or not, and the mapped weights: more than resident memory, except
    for some 40 MB of library code. A cgroup would count exactly, but most test machines do not allow one."""
    first, second = (start(reference, limit=512_000_000) for _ in range(2))
    assert first["chunks"] and second["chunks"]
    # The second start maps the weights that the first one prepared.
    assert second["peak"] <= size(reference) + 100e6
    assert first["peak"] <= size(reference) + 150e6


@pytest.mark.slow
def test_with_kernels_the_reference_model_takes_little_beyond_its_files(reference: Path) -> None:
    pytest.importorskip("edgelm_kernels")
    assert start(reference, limit=512_000_000, kernels="on")["peak"] <= size(reference) + 90e6
