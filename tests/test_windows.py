"""The Windows kernel library computes what this machine's library computes. Runs in Wine with onnxruntime's Windows
build; skipped if Wine or the wheels are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions import kernels

from .test_kernels import cases
from .test_wheels import unpacked

windows = pytest.importorskip("scripts.wheels.windows", reason="scripts/ is missing")
pytestmark = pytest.mark.skipif(windows.wine() is None, reason="Wine is not installed (Debian package wine64)")

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


def first_step(bundle: Path, tokens: int = 40) -> dict[str, np.ndarray]:
    """The inputs of a step that reads so many tokens into an empty cache and returns all their logits."""
    model = Bundle.open(bundle).manifest.model
    feeds = {
        "input_ids": np.arange(tokens, dtype=np.int64)[None] * 7 % model.vocab_size,
        "attention_mask": np.ones((1, tokens), np.int64),
        "logits_to_keep": np.array([tokens], np.int64),
    }
    for number, layer in enumerate(model.layers):
        assert layer is not None
        for kind, size in (("key", layer.key_size), ("value", layer.value_size)):
            shape = (1, layer.kv_heads, 0, size + model.kv.scale_bytes)
            feeds[f"past_key_values.{number}.{kind}"] = np.zeros(shape, model.kv.type)
    return feeds


def test_a_bundle_answers_as_on_this_machine(tiny_bundle: Path, library: Path) -> None:
    """Most bits come from the kernels. onnxruntime's own operators are built by another compiler on Windows, so logits
    and later values in the cache may differ in their last bits."""
    graph, feeds = tiny_bundle / GRAPH_NAME, first_step(tiny_bundle)
    logits = [
        np.frombuffer(raw, np.float32, 40 * 257).reshape(40, 257)
        for raw in (windows.compute(graph, feeds, library), here(graph, feeds))
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(*(rows.argmax(-1) for rows in logits))
