"""NaN and infinity in activations: no product turns them into numbers, with kernels or without, so the sampler
detects a broken model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from edgelm.export.passes.functions import GATED_ROWWISE_MATMUL, ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, WIDE
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import GRAPH_NAME, MANIFEST_NAME, file_digest
from edgelm.runtime.errors import SessionError
from edgelm.runtime.sessions import kernels

from .conftest import missing

DEPTH, COLUMNS = 70, 90
GELU = "GeluGatedRowwiseMatMul-tanh"
NAMES = [ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, GATED_ROWWISE_MATMUL, GELU]
NORMED = ["NormedRowwiseMatMul", "PostNormedRowwiseMatMul"]
WAYS = ["kernels", "onnxruntime"]


@pytest.fixture(params=WAYS)
def session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[ir.Model], Any]:
    """Opens graphs, with kernels and without."""
    with_kernels = request.param == "kernels"
    if with_kernels and importlib.util.find_spec("edgelm_kernels") is None:
        missing("edgelm-kernels is not installed")
    monkeypatch.setenv(kernels.SWITCH, "on" if with_kernels else "off")
    from . import test_kernels

    return lambda model: test_kernels.session(model, with_kernels)


def product(name: str) -> ir.Model:
    from .test_kernels import product_model

    weight = np.random.default_rng(0).integers(-127, 128, (DEPTH, COLUMNS)).astype(np.int8)
    weight[:, 3] = 0
    return product_model(name, weight, np.full(COLUMNS, 0.01, np.float32))


@pytest.mark.parametrize("what", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("name", [name + bits for name in NAMES for bits in ("", WIDE)])
def test_nan_or_infinity_makes_its_row_nan_and_no_other(
    name: str, rows: int, what: float, session: Callable[[ir.Model], Any]
) -> None:
    opened = session(product(name))
    width = DEPTH if name.removesuffix(WIDE) in (ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED) else 2 * DEPTH
    x = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    (expected,) = opened.run(None, {"x": x})
    for place in range(0, width, 7):
        spoilt = x.copy()
        # Whatever a gate makes of minus infinity, the product with infinity is NaN.
        spoilt[rows // 2, [place, (place + DEPTH) % width]] = what
        (got,) = opened.run(None, {"x": spoilt})
        assert np.isnan(got[rows // 2]).all()
        np.testing.assert_array_equal(np.delete(got, rows // 2, 0), np.delete(expected, rows // 2, 0))


@pytest.mark.parametrize("what", [np.nan, np.inf])
@pytest.mark.parametrize("name", [name + bits for name in NORMED for bits in ("", WIDE)])
def test_after_a_norm_nan_stays_and_infinity_reaches_the_sum(
    name: str, what: float, session: Callable[[ir.Model], Any]
) -> None:
    opened = session(product(name))
    feeds = {key: np.random.default_rng(2).normal(size=(3, DEPTH)).astype(np.float32) for key in ("x", "skip")}
    expected, _ = opened.run(None, feeds)
    feeds["x"][1, 40] = what
    got, total = opened.run(None, feeds)
    assert not np.isfinite(total[1, 40])
    assert np.isnan(got[1]).all() or np.isinf(what)
    np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_the_sampler_detects_nan(
    way: str, what: float, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix with a NaN scale: each row of its product has one NaN."""
    if way == "kernels" and importlib.util.find_spec("edgelm_kernels") is None:
        missing("edgelm-kernels is not installed")
    monkeypatch.setenv(kernels.SWITCH, "on" if way == "kernels" else "off")
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    spoil(bundle, "model.layers.0.mlp.down_proj.weight.scale", what)
    with load(bundle, response_cache=False) as engine:
        for tokens in (b"O", b"Once", b"Once upon a time" * 8):
            with pytest.raises(SessionError, match="NaN or infinite"):
                engine.generate(token_ids=list(tokens), max_tokens=1)


def spoil(bundle: Path, name: str, value: float) -> None:
    """Put a value into weights that are stored in the graph."""
    model = onnx.load(bundle / GRAPH_NAME, load_external_data=False)
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array = onnx.numpy_helper.to_array(weights).copy()
    array[5] = value
    weights.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, bundle / GRAPH_NAME)
    path = bundle / GRAPH_NAME
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["files"][GRAPH_NAME] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
