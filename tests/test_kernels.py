"""The compiled kernels against the function bodies that they replace. Skipped without the package (pip install
./kernels)."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.passes.functions import (
    BIASED,
    EDGELM,
    GATED_ROWWISE_MATMUL,
    GELU_GATED_ROWWISE_MATMUL,
    NORMED,
    NORMED_ROWWISE_MATMUL,
    POST_NORMED_ROWWISE_MATMUL,
    ROWWISE_MATMUL,
    ROWWISE_MATMUL_TRANSPOSED,
    WIDE,
    define,
)
from edgelm.export.passes.graph import ATTENTION, KEPT_ATTENTION, MICROSOFT
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime import load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.errors import SessionError
from edgelm.runtime.host import machine
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.sessions.protocol import KERNELS_PIECE_TOKENS, PIECE_TOKENS

from .conftest import missing
from .model_zoo import CONTEXT, tiny_model
from .test_models import FLOAT, session_of
from .test_passes import graph

edgelm_kernels = pytest.importorskip("edgelm_kernels", reason="edgelm-kernels is not installed")
pytestmark = pytest.mark.skipif(
    edgelm_kernels.arithmetic() is None, reason="edgelm-kernels has no code for this processor"
)

Array = NDArray[Any]
THREADS = 2
RUNNER = Path(__file__).with_name("run_with_kernels.py")


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.SWITCH, raising=False)


def session(model: ir.Model, with_kernels: bool, threads: int = THREADS, own_threads: bool = True) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if with_kernels:
        kernels.register(options, threads, own_threads)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def install(folder: Path, library: bytes) -> Path:
    """A library with its digest, as the package has them."""
    path = folder / "kernels.so"
    path.write_bytes(library)
    path.with_suffix(".sha256").write_text(hashlib.sha256(library).hexdigest())
    return path


def test_a_library_that_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgelm_kernels, "_LIBRARY", install(tmp_path, b"no library"))
    kernels._arithmetic.cache_clear()
    with pytest.raises(SessionError, match=r"edgelm-kernels is installed and cannot be loaded .*EDGELM_KERNELS=off"):
        kernels.identity()
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert kernels.identity() is None


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda whole: whole,
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte less": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "zeros within": lambda whole: whole[:0x8000] + bytes(0x8000) + whole[0x10000:],
    "one bit": lambda whole: whole[:0x8000] + bytes([whole[0x8000] ^ 1]) + whole[0x8001:],
    "random behind the headers": lambda whole: whole[:0x270] + np.random.default_rng(0).bytes(len(whole) - 0x270),
}
# In a process of its own, which it may crash.
DAMAGED = """
import pathlib, sys, edgelm_kernels
from edgelm.runtime.cli import main
edgelm_kernels._LIBRARY = pathlib.Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def with_library(library: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command of edgelm with this kernel library."""
    words = [sys.executable, "-c", DAMAGED, str(library), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_refused_in_one_line(damage: str, tmp_path: Path, tiny_bundle: Path) -> None:
    library = install(tmp_path, edgelm_kernels.library().read_bytes())
    library.write_bytes(DAMAGES[damage](library.read_bytes()))
    done = with_library(library, "run", tiny_bundle, "Once", "--max-tokens", "2")
    if damage == "whole":
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert f"{library} is damaged" in line and "install it again" in line and "EDGELM_KERNELS=off" in line


def test_the_doctor_reports_everything_despite_a_damaged_library(tmp_path: Path) -> None:
    library = install(tmp_path, edgelm_kernels.library().read_bytes())
    library.write_bytes(library.read_bytes()[:9000])
    done = with_library(library, "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{library} is damaged" in done.stdout and "versions" in done.stdout


@pytest.mark.parametrize("lost", ["kernels.so", "kernels.sha256"])
def test_a_library_that_lost_a_file_is_refused_in_one_line(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgelm_kernels, "_LIBRARY", install(tmp_path, edgelm_kernels.library().read_bytes()))
    (tmp_path / lost).unlink()
    kernels._arithmetic.cache_clear()
    with pytest.raises(SessionError, match=rf"cannot be loaded .*{lost}.*install it again"):
        kernels.identity()


def test_kernels_of_another_version_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(edgelm_kernels, "INTERFACE")
    kernels._arithmetic.cache_clear()
    with pytest.raises(SessionError, match=r"belongs to another version of edgelm.*EDGELM_KERNELS=off"):
        kernels.identity()
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert kernels.identity() is None


# The products: same bits as the bodies


EPSILON = 0.01
NORMS = {NORMED_ROWWISE_MATMUL: ["g"], POST_NORMED_ROWWISE_MATMUL: ["p", "g"]}
# GELU's function has a variant for each kind.
EXACT_GELU, TANH_GELU = (f"{GELU_GATED_ROWWISE_MATMUL}-{kind}" for kind in ("none", "tanh"))
GATES = [GATED_ROWWISE_MATMUL, EXACT_GELU, TANH_GELU]


def product_model(case: str, weight: Array, scales: Array) -> ir.Model:
    """A call of one function. weight: (depth, columns)."""
    depth, columns = weight.shape
    kind, _, approximate = case.removeprefix(BIASED).removesuffix(WIDE).partition("-")
    name = BIASED * case.startswith(BIASED) + kind + WIDE * case.endswith(WIDE)
    last = "w, s, b" if case.startswith(BIASED) else "w, s"
    inputs, call, outputs = (f"float[rows,{depth}] x", f"y = {EDGELM}.{name}(x, {last})", f"float[rows,{columns}] y")
    if kind in NORMS:
        inputs, outputs = f"{inputs}, float[rows,{depth}] skip", f"{outputs}, float[rows,{depth}] total"
        call = f"y, total = {EDGELM}.{name} <epsilon = {EPSILON}> (x, skip, {', '.join(NORMS[kind])}, {last})"
    if kind in (GATED_ROWWISE_MATMUL, GELU_GATED_ROWWISE_MATMUL):
        inputs = f"float[rows,{2 * depth}] x"
        attributes = f'<approximate = "{approximate}">' if approximate else ""
        call = f"y = {EDGELM}.{name} {attributes} (x, {last})"
    weights = {"w": np.ascontiguousarray(weight.T) if kind == ROWWISE_MATMUL_TRANSPOSED else weight, "s": scales}
    weights |= {norm: norm_weights(depth, norm) for norm in NORMS.get(kind, [])}
    weights |= {"b": norm_weights(columns, "b")} if case.startswith(BIASED) else {}
    model = graph(f"{inputs} -> {outputs}", call, weights, (EDGELM, MICROSOFT))
    define(model, name)
    return model


def norm_weights(depth: int, norm: str = "g") -> Array:
    return np.random.default_rng([depth, ord(norm)]).uniform(-2, 2, depth).astype(np.float32)


SIZES = st.tuples(
    st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 289, 576, 700])),
    st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 257, 300, 530, 960])),
)


BARE = [ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED]
WITH_BIASES = [BIASED + name for name in BARE]


@pytest.mark.parametrize("name", [name + bits for name in (*BARE, *WITH_BIASES) for bits in ("", WIDE)])
@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    rows=st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 23, 24, 25, 97, 200]), min_size=1, max_size=3),
    threads=st.tuples(st.integers(1, 4), st.booleans()),
    seed=st.integers(0, 99),
)
def test_a_product_has_the_bits_of_its_body(
    name: str, sizes: tuple[int, int], rows: list[int], threads: tuple[int, bool], seed: int
) -> None:
    depth, columns = sizes
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, (depth, columns)).astype(np.int8)
    weight[:, random.integers(columns)] = 127
    model = product_model(name, weight, random.uniform(1e-4, 1, columns).astype(np.float32))
    body, kernel = session(model, False), session(model, True, *threads)
    for count in rows:
        x = (random.normal(size=(count, depth)) * 10.0 ** random.integers(-6, 6, (count, 1))).astype(np.float32)
        x[random.integers(count)] = 0
        x[random.integers(count), random.integers(depth)] = 1e4
        (expected,), (got,) = body.run(None, {"x": x}), kernel.run(None, {"x": x})
        np.testing.assert_array_equal(got, expected)


LIMITS = [1e-42, 1e-38, 2.0**-60, 2.0**60, 1e30, 3e38]


@pytest.mark.parametrize("name", [name + WIDE for name in BARE])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 40])
def test_a_product_of_16_bits_has_the_bits_of_its_body_at_the_ends_of_floats(name: str, rows: int) -> None:
    """Largest magnitudes near the smallest and the largest float. Values halfway between two steps of the high plane
    and of the low one, and values far below a step."""
    random = np.random.default_rng(rows)
    weight = random.integers(-127, 128, (128, 70)).astype(np.int8)
    model = product_model(name, weight, np.full(70, 1e-3, np.float32))
    body, kernel = session(model, False), session(model, True)
    for largest in LIMITS:
        codes = random.integers(-254, 255, (rows, 128)) / 254
        codes[:, ::3] = random.integers(-65024, 65025, (rows, 43)) / 65024
        codes[:, ::7] *= 1e-30
        codes[:, 5] = 1
        x = (codes * largest).astype(np.float32)
        (expected,), (got,) = body.run(None, {"x": x}), kernel.run(None, {"x": x})
        np.testing.assert_array_equal(got, expected)


def test_products_of_16_bits_do_not_overflow() -> None:
    """Values whose low plane is -128, as many as a kernel sums in 16 bits, against the largest weights."""
    weight = np.full((256, 80), 127, np.int8)
    weight[:, ::2] = -127
    model = product_model(ROWWISE_MATMUL + WIDE, weight, np.ones(80, np.float32))
    x = np.full((12, 256), -(127 * 256 - 128) / 32512, np.float32)
    x[::2] *= -1
    x[:, 0] = 1
    for sign in (1, -1):
        for rows in (1, 12):
            (expected,), (got,) = (session(model, way).run(None, {"x": sign * x[:rows]}) for way in (False, True))
            np.testing.assert_array_equal(got, expected)


def product_and_rows(depth: int = 600, columns: int = 200) -> tuple[ir.Model, Array]:
    random = np.random.default_rng(depth)
    weight = random.integers(-127, 128, (depth, columns)).astype(np.int8)
    model = product_model(ROWWISE_MATMUL, weight, random.uniform(0.1, 1, columns).astype(np.float32))
    return model, random.normal(size=(40, depth)).astype(np.float32)


def test_sleeping_threads_wake_up() -> None:
    model, rows = product_and_rows()
    (expected,) = session(model, False).run(None, {"x": rows[:1]})
    kernel = session(model, True, 4)
    for _ in range(10):
        np.testing.assert_array_equal(kernel.run(None, {"x": rows[:1]})[0], expected)
        time.sleep(0.02)


def test_calls_from_several_threads_at_once() -> None:
    """Calls of one session, and of several that are opened and closed meanwhile."""
    model, rows = product_and_rows()
    (expected,) = session(model, False).run(None, {"x": rows})
    shared = session(model, True, 3)

    def call(seed: int) -> None:
        random = np.random.default_rng(seed)
        kernel = shared if seed % 2 else session(model, True, 1 + seed % 4)
        for _ in range(50):
            begin = random.integers(len(rows))
            end = random.integers(begin, len(rows)) + 1
            np.testing.assert_array_equal(kernel.run(None, {"x": rows[begin:end]})[0], expected[begin:end])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(12)))


def test_more_threads_than_the_system_allows() -> None:
    model, rows = product_and_rows(4500, 70)
    (expected,) = session(model, False).run(None, {"x": rows})
    kernel = session(model, True, 100)
    for count in (1, 40):
        np.testing.assert_array_equal(kernel.run(None, {"x": rows[:count]})[0], expected[:count])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_computes() -> None:
    model, rows = product_and_rows()
    kernel = session(model, True, 3)
    (expected,) = kernel.run(None, {"x": rows})
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        got = kernel.run(None, {"x": rows})[0]
        os._exit(0 if np.array_equal(got, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_largest_products_do_not_overflow() -> None:
    """All values at their limits, in both directions: a kernel that sums in 16 bits would overflow."""
    weight = np.full((256, 80), 127, np.int8)
    weight[:, ::2] = -127
    model = product_model(ROWWISE_MATMUL, weight, np.ones(80, np.float32))
    x = np.ones((12, 256), np.float32)
    x[::2] = -1
    for rows in (1, 12):
        (expected,), (got,) = (session(model, way).run(None, {"x": x[:rows]}) for way in (False, True))
        np.testing.assert_array_equal(got, expected)


def test_a_row_of_another_length_is_refused() -> None:
    model = product_model(ROWWISE_MATMUL, np.ones((8, 4), np.int8), np.ones(4, np.float32))
    model.graph.inputs[0].shape = ir.Shape(["rows", "depth"])
    with pytest.raises(Exception, match="rows of 8 values are multiplied, found 9"):
        session(model, True).run(None, {"x": np.ones((2, 9), np.float32)})


# What comes before a product: as exact as float32, and a row's bits do not depend on the other rows


def rows_of(random: np.random.Generator, name: str, rows: int, depth: int) -> dict[str, Array]:
    """Inputs whose rows differ in magnitude, with open and closed gates. Of several rows one is zeros; of many one has
    an outlier."""
    inputs, width = (("x", "skip"), depth) if name.removesuffix(WIDE) in NORMS else (("x",), 2 * depth)
    sizes = 10.0 ** random.integers(-4, 3, (rows, 1))
    feeds = {name: (random.normal(size=(rows, width)) * sizes).astype(np.float32) for name in inputs}
    for array in feeds.values():
        array[0] *= rows == 1
        array[rows // 2, random.integers(width)] *= 1e4 if rows > 4 else 1
    return feeds


def exact_rows(name: str, feeds: dict[str, Array], depth: int) -> NDArray[np.float64]:
    """The rows that are multiplied, in double precision."""
    name = name.removesuffix(WIDE)
    if name in NORMS:
        return normed(exact_sum(name, feeds, depth), norm_weights(depth))
    gate, up = np.split(feeds["x"].astype(np.float64), 2, axis=-1)
    return np.asarray(gate * SHARES[name](gate) * up)


def exact_sum(name: str, feeds: dict[str, Array], depth: int) -> NDArray[np.float64]:
    """The rows that are normed, in double precision; a plain sum is a sum of floats."""
    if name == NORMED_ROWWISE_MATMUL:
        return np.asarray(feeds["x"] + feeds["skip"], np.float64)
    return feeds["x"] + normed(feeds["skip"].astype(np.float64), norm_weights(depth, "p"))


def normed(x: NDArray[np.float64], weight: Array) -> NDArray[np.float64]:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.float32(EPSILON)) * weight)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.maximum(x, -700))))


SHARES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    GATED_ROWWISE_MATMUL: sigmoid,
    EXACT_GELU: lambda x: np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
    TANH_GELU: lambda x: sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}
TINY = float(np.finfo(np.float32).tiny)
FRONTS = [*NORMS, *GATES]
ALL_FRONTS = [*FRONTS, *(name + WIDE for name in FRONTS)]


@pytest.mark.parametrize("name", ALL_FRONTS)
@settings(max_examples=40, deadline=None)
@given(
    depth=st.one_of(st.integers(1, 200), st.sampled_from([64, 576])), rows=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_norms_and_gates_before_a_product_are_as_exact_as_float32(name: str, depth: int, rows: int, seed: int) -> None:
    """Multiplied by the unit matrix, a row comes out as it was quantized. It is off by half a step at most, plus a
    thousandth of an 8-bit step for float32's rounding. The largest value is not rounded at all."""
    random = np.random.default_rng(seed)
    model = product_model(name, np.eye(depth, dtype=np.int8) * 127, np.full(depth, 1 / 127, np.float32))
    feeds = rows_of(random, name, rows, depth)
    got, *rest = session(model, True).run(None, feeds)
    exact = exact_rows(name, feeds, depth)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    # A value halfway between two 16-bit steps, at the end of the low plane, may be off by a whole step.
    limit = 1.02 / 32512 if name.endswith(WIDE) else 0.501 / 127
    # Shares below 2^-126 become 0; they are multiplied with the largest gate.
    assert (np.abs(got - exact) <= limit * largest + TINY * 1e6).all()
    at = np.abs(exact).argmax(axis=-1)[:, None]
    # GELU far below 0 has its exponential's relative error, some millionths of a tiny value.
    # The norm of a sum whose terms nearly cancel has the error of the terms.
    kind = name.removesuffix(WIDE)
    rtol, atol = (1e-5, TINY * 1e6) if kind in (EXACT_GELU, TANH_GELU) else (2e-6, TINY)
    rtol = 1e-5 if kind == POST_NORMED_ROWWISE_MATMUL else rtol
    np.testing.assert_allclose(*(np.take_along_axis(rows, at, -1) for rows in (got, exact)), rtol=rtol, atol=atol)
    if name.removesuffix(WIDE) == NORMED_ROWWISE_MATMUL:
        np.testing.assert_array_equal(rest[0], feeds["x"] + feeds["skip"])
    elif rest:
        np.testing.assert_allclose(rest[0], exact_sum(name.removesuffix(WIDE), feeds, depth), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL_FRONTS)
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_a_product_with_a_norm_or_gate_agrees_with_its_body(name: str, rows: int) -> None:
    """Except for values halfway between two steps, which may round either way."""
    random = np.random.default_rng(rows)
    depth, columns = 300, 130
    weight = random.integers(-127, 128, (depth, columns)).astype(np.int8)
    model = product_model(name, weight, np.ones(columns, np.float32))
    feeds = rows_of(random, name, rows, depth)
    exact = exact_rows(name, feeds, depth)
    largest = np.maximum(np.abs(exact).max(axis=-1, keepdims=True), TINY)
    steps = 32512 if name.endswith(WIDE) else 127
    codes = exact / largest * steps
    halfway = np.abs(np.abs(codes - np.floor(codes)) - 0.5) < (0.1 if name.endswith(WIDE) else 1e-3)
    allowed = (halfway @ np.abs(weight.astype(np.float64)) + 0.1) * largest / steps
    allowed += 1e-6 * largest * np.sqrt(depth) * 127
    (body, *_), (got, *_) = (session(model, way).run(None, feeds) for way in (False, True))
    assert (np.abs(got - body) <= allowed).all()


@pytest.mark.parametrize("name", ALL_FRONTS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_row_with_a_norm_or_gate_has_the_same_bits_among_any_others(name: str, data: st.DataObject) -> None:
    depth, rows, threads, own = data.draw(
        st.tuples(st.integers(1, 150), st.integers(1, 60), st.integers(1, 4), st.booleans())
    )
    random = np.random.default_rng(depth)
    weight = random.integers(-127, 128, (depth, 70)).astype(np.int8)
    model = product_model(name, weight, random.uniform(0.01, 1, 70).astype(np.float32))
    feeds = rows_of(random, name, rows, depth)
    whole = session(model, True, 1).run(None, feeds)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    part = session(model, True, threads, own).run(None, {key: array[begin:end] for key, array in feeds.items()})
    for got, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got, expected[begin:end])


def test_halves_and_sums_of_another_length_are_refused() -> None:
    weight, scales = np.ones((8, 4), np.int8), np.ones(4, np.float32)
    gated = product_model(GATED_ROWWISE_MATMUL, weight, scales)
    gated.graph.inputs[0].shape = ir.Shape(["rows", "width"])
    with pytest.raises(Exception, match="rows of 16 values are multiplied, found 8"):
        session(gated, True).run(None, {"x": np.ones((2, 8), np.float32)})
    normed = product_model(NORMED_ROWWISE_MATMUL, weight, scales)
    x = np.ones((2, 8), np.float32)
    with pytest.raises(Exception, match="two values of one shape"):
        session(normed, True).run(None, {"x": x, "skip": x[:1]})
    normed.graph.initializers["g"].const_value = ir.tensor(np.ones(7, np.float32), name="g")
    with pytest.raises(Exception, match="a weight for each value of a row"):
        session(normed, True)


# Attention: close to the bodies, within a small part of the cache's rounding error, and the same under any cut


OWN_SCALES = "int8 by token"


class Attention:
    """A model of one attention, packed or not, and its cache in buffers that a step reads and updates in place.

    cached: "int8", "float32", or "int8 by token", whose rows end with their own scale, so that the graph leaves the row
    length open; some: `run` says which rows are wanted; normed: heads of queries and keys are normed first.
    """

    def __init__(
        self,
        *,
        heads: int,
        groups: int,
        size: int,
        packed: bool,
        window: int,
        rotary: int,
        cached: str = "int8",
        some: bool = False,
        normed: bool = False,
    ) -> None:
        by_token, cached = cached == OWN_SCALES, cached.split(maxsplit=1)[0]
        self.groups, self.size, self.packed, self.cached = groups, size, packed, cached
        self.row = size + (4 if by_token else 0)
        self.widths = (heads * size, groups * size, groups * size)
        random = np.random.default_rng(heads * 100 + size)
        angles = random.uniform(0, 6, (1024, max(1, rotary // 2)))
        scales = [random.uniform(0.01, 0.04, groups * size).astype(np.float32) for _ in range(2)]
        inputs = [f"float[batch,new,{width}] {name}" for name, width in zip("qkv", self.widths, strict=True)]
        if packed:
            inputs = [f"float[batch,new,{sum(self.widths)}] q"]
        cached = {"int8": "int8", "float32": "float"}[cached]
        row = "row" if by_token else size
        cache = f"{cached}[batch,{groups},past,{row}]"
        text = (
            f"{', '.join(inputs)}, {cache} pk, {cache} pv, int32[batch] lengths, int32 total"
            f"{', int64[1] start -> float[batch,kept' if some else ' -> float[batch,new'},{heads * size}] y, "
            f"{cached}[batch,{groups},all,{row}] key, "
            f"{cached}[batch,{groups},all,{row}] value"
        )
        attributes = f"num_heads={heads}, kv_num_heads={groups}, scale=0.2, do_rotary={int(rotary > 0)}"
        attributes += f", local_window_size={window or -1}"
        rest = "cos, sin" if rotary else ","
        if cached == "int8":
            attributes += ', kv_cache_bit_width=8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL"'
            rest += ", , , , ks, vs"
        elif some:
            rest += ", , , , , "
        name = KEPT_ATTENTION if some else ATTENTION
        if normed:
            name, attributes = NORMED[name], f"{attributes}, epsilon={EPSILON}"
        rest += ", start" if some else ""
        body = (
            f"y, key, value = {EDGELM}.{name} <{attributes}> "
            f"(q, {'qn, kn' if normed else ', ' if packed else 'k, v'}, pk, pv, lengths, total, {rest})".replace(
                ", ,  ,", ", , ,"
            )
        )
        weights = {"ks": scales[0], "vs": scales[1]}
        if normed:
            weights |= {norm: norm_weights(size, norm[0]) for norm in ("qn", "kn")}
        if rotary:
            weights |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        self.model = graph(text, body, weights, (EDGELM, MICROSOFT))
        define(self.model, name)

    def run(
        self, inference: Any, x: list[Array], cuts: list[int], capacity: int, start: int | None = None
    ) -> tuple[Array, list[Array]]:
        """The outputs (batch, positions, width) of all positions, fed in pieces, and the cache's keys and values.
        start: the first wanted row of each piece."""
        batch = len(x[0])
        cache: list[Array] = [np.zeros((batch, self.groups, capacity, self.row), self.cached) for _ in range(2)]
        found, begin = [], 0
        for end in itertools.accumulate(cuts):
            parts = [np.ascontiguousarray(part[:, begin:end]) for part in x]
            feeds = dict(zip("qkv", parts, strict=True))
            if self.packed:
                feeds = {"q": np.concatenate(parts, axis=-1)}
            binding = inference.io_binding()
            feeds |= {"lengths": np.full(batch, end - 1, np.int32), "total": np.array(end, np.int32)}
            if start is not None:
                feeds["start"] = np.array([start])
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, other, buffer in zip(("pk", "pv"), ("key", "value"), cache, strict=True):
                place = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(other, *place)
            binding.bind_output("y")
            inference.run_with_iobinding(binding)
            found.append(binding.copy_outputs_to_cpu()[-1])
            begin = end
        return np.concatenate(found, axis=1), cache


SHAPES = [
    {"heads": 4, "groups": 2, "size": 16, "packed": True, "window": 0, "rotary": 16},
    {"heads": 9, "groups": 3, "size": 64, "packed": True, "window": 0, "rotary": 64},
    {"heads": 4, "groups": 4, "size": 16, "packed": False, "window": 0, "rotary": 16},
    {"heads": 8, "groups": 1, "size": 80, "packed": False, "window": 0, "rotary": 32},
    {"heads": 6, "groups": 2, "size": 48, "packed": True, "window": 70, "rotary": 16},
    {"heads": 3, "groups": 1, "size": 40, "packed": False, "window": 0, "rotary": 0},
    {"heads": 2, "groups": 1, "size": 256, "packed": True, "window": 5, "rotary": 0},
    {"heads": 30, "groups": 1, "size": 16, "packed": True, "window": 200, "rotary": 16},
    {"heads": 4, "groups": 1, "size": 256, "packed": True, "window": 70, "rotary": 256, "normed": True},
    {"heads": 6, "groups": 3, "size": 40, "packed": True, "window": 0, "rotary": 0, "normed": True},
    {"heads": 4, "groups": 2, "size": 128, "packed": True, "window": 0, "rotary": 128, "normed": True},
]
SHAPES = [{**shape, "cached": cached} for cached in ("int8", OWN_SCALES, "float32") for shape in SHAPES]
# Shapes whose cache onnxruntime's operator can also read.
BODY_SHAPES = [shape for shape in SHAPES if shape["cached"] != OWN_SCALES]


def unpacked(attention: Attention, cache: Array) -> tuple[Array, Array]:
    """The values of a cache's rows, and the rows' scales."""
    stored, scale = np.split(cache, [attention.size], axis=-1)
    return stored, np.ascontiguousarray(scale).view(np.float32) if scale.shape[-1] else np.ones(1, np.float32)


def values(attention: Attention, batch: int, positions: int) -> list[Array]:
    random = np.random.default_rng(positions)
    return [random.normal(size=(batch, positions, width)).astype(np.float32) for width in attention.widths]


@pytest.mark.parametrize("shape", BODY_SHAPES)
def test_attention_agrees_with_its_body(shape: dict[str, Any]) -> None:
    attention = Attention(**shape)
    x = values(attention, 1, 300)
    body, kernel = (session(attention.model, way) for way in (False, True))
    cuts = [270, 1, 1, 8, 20]
    expected, cache = attention.run(body, x, cuts, 320)
    got, own_cache = attention.run(kernel, x, cuts, 320)
    # With an INT8 cache, queries are rounded to 16 bits, attention weights to 15, and keys and values to 8. With a
    # float32 cache, all three are rounded to 11 to 13 bits; heads of 256 values have the largest scores here.
    limit = {"int8": 2e-4, "float32": 2e-3 if attention.size == 256 else 8e-4}[attention.cached]
    assert np.sqrt(np.mean((got - expected) ** 2)) < limit * np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(got, expected, atol=3 * limit * np.abs(expected).max())
    for left, right in zip(own_cache, cache, strict=True):
        # Rotation in another order of operations occasionally rounds a key the other way.
        if attention.cached == "int8":
            assert np.abs(left.astype(int) - right).max() <= 1 and (left == right).mean() > 0.999
        else:
            np.testing.assert_allclose(left, right, rtol=0, atol=4e-6 if shape.get("normed") else 1e-6)


@pytest.mark.parametrize(
    ("with_kernels", "batch", "cuts"), [(True, 1, [150, 115, 5]), (True, 2, [270]), (False, 1, [270, 5])]
)
@pytest.mark.parametrize("start", [0, -1, -2, -9, -150, -9999, 3, 260, 2**63 - 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_wanted_rows_have_the_same_bits_as_in_a_full_result(
    shape: dict[str, Any], start: int, with_kernels: bool, batch: int, cuts: list[int]
) -> None:
    if shape["cached"] == OWN_SCALES and not with_kernels:
        shape = {**shape, "cached": "int8"}  # function bodies have rows of head size
    some, whole = Attention(**shape, some=True), Attention(**shape)
    x = values(whole, batch, sum(cuts))
    expected, cache = whole.run(session(whole.model, with_kernels), x, cuts, 320)
    got, own_cache = some.run(session(some.model, with_kernels), x, cuts, 320, start)
    ends = list(itertools.accumulate(cuts))
    pieces = [expected[:, end - cut : end][:, start:] for cut, end in zip(cuts, ends, strict=True)]
    np.testing.assert_array_equal(got, np.concatenate(pieces, axis=1))
    for left, right in zip(own_cache, cache, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_scores_and_weights_do_not_overflow(shape: dict[str, Any], sign: int) -> None:
    """All products at their limits: every position has the same weight, and the output equals the common value."""
    attention = Attention(**{**shape, "rotary": 0})
    x = [np.full((1, 300, width), 50, np.float32) for width in attention.widths]
    x[1] *= sign
    got, cache = attention.run(session(attention.model, True), x, [140, 1, 159], 300)
    scales = attention.model.graph.initializers["vs"].const_value if attention.cached == "int8" else None
    stored, of_row = unpacked(attention, cache[1])
    value = (stored * of_row)[0, :, 0].reshape(-1) * (1 if scales is None else scales.numpy())
    heads = value.reshape(attention.groups, 1, -1).repeat(shape["heads"] // attention.groups, axis=1)
    np.testing.assert_allclose(got, np.broadcast_to(heads.reshape(-1), got.shape), rtol=2e-4)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape["cached"] == "float32"])
def test_keys_and_values_of_very_different_magnitudes_keep_their_precision(shape: dict[str, Any]) -> None:
    """Keys and values of large, small and zero magnitude, position by position: each row keeps its own precision."""
    attention = Attention(**shape)
    x = values(attention, 1, 300)
    sizes = 10.0 ** np.random.default_rng(2).integers(-20, 4, (1, 300, 1))
    sizes[:, ::5] = 0
    x[1][:, ::3] *= 1e-6
    x[1][:, ::7] = 0
    x[2] *= sizes.astype(np.float32)
    (expected, _), (got, _) = (attention.run(session(attention.model, way), x, [280, 20], 300) for way in (False, True))
    seen = np.maximum.accumulate(np.abs(x[2]).max(axis=-1), axis=1)[..., None]
    if shape["window"]:
        seen = np.stack([np.abs(x[2][0, max(0, i + 1 - shape["window"]) : i + 1]).max() for i in range(300)])[:, None]
    assert (np.abs(got - expected) <= 3e-3 * seen).all()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_attention_has_the_same_bits_under_any_cut(shape: dict[str, Any], data: st.DataObject) -> None:
    attention = Attention(**shape)
    positions, batch = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 3))
    cuts: list[int] = []
    while (left := positions - sum(cuts)) > 0:
        cuts.append(min(left, data.draw(st.sampled_from([1, 2, 3, 7, 12, 64, 128, 250]))))
    if batch > 1:  # onnxruntime's contract: one token a row after the first step
        cuts = [positions - min(3, positions - 1), *[1] * min(3, positions - 1)]
    x = values(attention, batch, positions)
    whole, cache = attention.run(session(attention.model, True, 1), [part[:1] for part in x], [positions], 320)
    got, own_cache = attention.run(
        session(attention.model, True, data.draw(st.integers(1, 4)), data.draw(st.booleans())), x, cuts, 310
    )
    np.testing.assert_array_equal(got[:1], whole)
    for left, right in zip(own_cache, cache, strict=True):
        np.testing.assert_array_equal(left[:1, :, :positions], right[:, :, :positions])


TOKEN_SHAPES = [shape for shape in SHAPES if shape["cached"] == OWN_SCALES]


def exact(shape: dict[str, Any], x: list[Array]) -> Array:
    """The same attention on unrounded keys and values: a float32 cache, in onnxruntime."""
    attention = Attention(**{**shape, "cached": "float32"})
    return attention.run(session(attention.model, False), x, [len(x[0][0])], len(x[0][0]))[0]


@pytest.mark.parametrize("size", [1, 1e4, 1e-6])
@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_scales_computed_when_a_row_is_written_fit_any_magnitude(shape: dict[str, Any], size: float) -> None:
    """Keys and values of any magnitude, even far beyond the graph's scales, lose no more than 8 bits' rounding."""
    attention = Attention(**shape)
    x = values(attention, 1, 300)
    x[0] /= np.float32(size)
    x[1:] = [part * np.float32(size) for part in x[1:]]
    expected = exact(shape, x)
    got, cache = attention.run(session(attention.model, True), x, [270, 1, 29], 320)
    # Normed keys with random weights are long, and rounding errors of scores grow with their length.
    loss = 0.04 if shape.get("normed") else 0.02
    assert np.sqrt(np.mean((got - expected) ** 2)) < loss * np.sqrt(np.mean(expected**2))
    for rows in cache:
        stored = unpacked(attention, rows)[0][:, :, :300].astype(int)
        assert (np.abs(stored).max(axis=-1) == 127).all(), "each row uses its full range"


@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_one_large_token_costs_the_others_nothing(shape: dict[str, Any]) -> None:
    attention = Attention(**shape)
    x = values(attention, 1, 200)
    _, plain = attention.run(session(attention.model, True), x, [200], 200)
    for part in x[1:]:
        part[:, 7] *= 1e4
    _, cache = attention.run(session(attention.model, True), x, [200], 200)
    others = np.arange(200) != 7
    for left, right in zip(plain, cache, strict=True):
        np.testing.assert_array_equal(left[:, :, others], right[:, :, others])


@pytest.mark.parametrize("what", [1e38, 0.0, 1e-42])
@pytest.mark.parametrize("shape", TOKEN_SHAPES[:2])
def test_extreme_values_leave_earlier_positions_unchanged(shape: dict[str, Any], what: float) -> None:
    attention = Attention(**shape)
    x = values(attention, 1, 150)
    expected, _ = attention.run(session(attention.model, True), x, [150], 150)
    for part in x[1:]:
        part[:, 140] = what
    for cuts in ([150], [140, 1, 9]):
        got, _ = attention.run(session(attention.model, True), x, cuts, 150)
        np.testing.assert_array_equal(got[:, :140], expected[:, :140])
        assert np.isfinite(got[:, 140:]).all()


@pytest.mark.parametrize("what", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], TOKEN_SHAPES[1], SHAPES[-1]])
def test_nan_and_infinite_queries_keys_and_values_are_refused(shape: dict[str, Any], part: int, what: float) -> None:
    """An INT8 cache cannot store them: later positions would attend to ordinary numbers."""
    attention = Attention(**shape)
    x = values(attention, 1, 60)
    x[part][:, 50, 3] = what
    for cuts in ([60], [50, 1]):
        with pytest.raises(Exception, match="queries, keys or values are NaN or infinite"):
            attention.run(session(attention.model, True), [rows[:, : sum(cuts)] for rows in x], cuts, 60)
    attention.run(session(attention.model, True), [rows[:, :50] for rows in x], [50], 60)


def test_rows_of_another_length_are_refused() -> None:
    attention = Attention(**TOKEN_SHAPES[0])
    attention.row += 1
    with pytest.raises(Exception, match="another length than a head, with or without a scale"):
        attention.run(session(attention.model, True), values(attention, 1, 3), [3], 8)


@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_an_open_row_of_head_size_has_the_bits_of_a_fixed_one(shape: dict[str, Any]) -> None:
    """If the runtime stores no scales in the cache, kernels use only the graph's."""
    attention, fixed = Attention(**shape), Attention(**{**shape, "cached": "int8"})
    attention.row = attention.size
    x = values(attention, 1, 150)
    expected, cache = fixed.run(session(fixed.model, True), x, [130, 20], 150)
    got, own_cache = attention.run(session(attention.model, True), x, [130, 20], 150)
    np.testing.assert_array_equal(got, expected)
    for left, right in zip(own_cache, cache, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.parametrize("settings", [{}, {"kv": "float32"}, {"kv": "float32", "scheme": "fp32"}])
def test_step_padding_and_piece_length_follow_who_computes_attention(
    export_tiny: Callable[..., Path], settings: dict[str, Any], switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(export_tiny(**settings))
    monkeypatch.setenv(kernels.SWITCH, switch)
    opened = open_session(bundle, threads=THREADS)
    by_kernels = switch == "on" and settings.get("scheme") is None
    assert opened.capabilities.least_rows == (2 if settings.get("kv") == "float32" and not by_kernels else 1)
    assert opened.capabilities.piece_tokens == (KERNELS_PIECE_TOKENS if by_kernels else PIECE_TOKENS)
    opened.close()


def test_engines_with_and_without_kernels_coexist(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as served, load(tiny_bundle, kernels=False) as plain:
        found = [engine._session.capabilities.piece_tokens for engine in (served, plain)]
        assert found == [KERNELS_PIECE_TOKENS, PIECE_TOKENS]
        assert served._requests._numerics != plain._requests._numerics
    assert kernels.identity() is not None


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt2", "olmoe"])
def test_rows_on_a_float32_cache_have_the_bits_of_their_texts_alone(model_type: str, tmp_path: Path) -> None:
    """Covers grouped heads, a window, norms of heads, learned positions, experts; rows of different lengths, some of
    which leave."""
    alone = quantized(model_type, tmp_path)
    assert alone.capabilities.least_rows == 1

    @settings(max_examples=8, deadline=None)
    @given(
        st.lists(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 256, 290])), min_size=1, max_size=5),
        st.lists(st.integers(0, 4), min_size=1, max_size=12),
        st.integers(0, 99),
    )
    def check(lengths: list[int], leaving: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        texts = [random.integers(0, 256, length).tolist() for length in lengths]
        got: list[list[Array]] = [[] for _ in texts]
        rows, held = alone.rows(), list(range(len(texts)))
        for row, text in enumerate(texts):
            cut = int(random.integers(len(text)))
            for piece in filter(None, (text[:cut], text[cut:])):
                last = rows.feed(row, piece)[0].copy()
            got[row].append(last)
        for leaves in leaving:
            tokens = random.integers(0, 256, len(held)).tolist()
            for text, token, logits in zip(held, tokens, rows.step(tokens), strict=True):
                texts[text].append(token)
                got[text].append(logits.copy())
            if leaves < len(held) - 1:
                last_row = held.pop()
                if leaves < len(held):
                    rows.copy(len(held), leaves, rows.length(len(held)))
                    held[leaves] = last_row
        for text, logits in zip(texts, got, strict=True):
            alone.rewind(0)
            np.testing.assert_array_equal(np.array(logits), alone.step(text, len(logits)))

    check()


def quantized(model_type: str, folder: Path) -> OrtSession:
    """A random model of the zoo in row-wise INT8, with a float32 cache."""
    traced = trace_model(tiny_model(model_type))
    ir.passes.PassManager([*fusing_passes(CONTEXT), *quantizing_passes("int8-rowwise", 8, {})])(traced.graph)
    opened = session_of(traced, folder / "quantized.onnx", FLOAT)
    assert isinstance(opened, OrtSession)
    return opened


# Processors


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products and attentions of several sizes with inputs, laid out for `run_with_kernels`."""
    folder = tmp_path_factory.mktemp("cases")
    random = np.random.default_rng(1)
    weight = random.integers(-127, 128, (100, 150)).astype(np.int8)
    for name in (*BARE, *(name + WIDE for name in BARE), *ALL_FRONTS):
        save(folder / name, product_model(name, weight, np.full(150, 0.01, np.float32)))
        for number, rows in enumerate((1, 3, 9, 40)):
            feeds = {"x": random.normal(size=(rows, 100)).astype(np.float32)}
            feeds = rows_of(random, name, rows, 100) if name in ALL_FRONTS else feeds
            np.savez(folder / f"{name}.{number}.npz", **feeds)
    for cached, normed in itertools.product(("int8", OWN_SCALES, "float32"), (False, True)):
        shape: dict[str, Any] = {"heads": 4, "groups": 2, "size": 48, "packed": True, "window": 0, "rotary": 48}
        attention = Attention(**shape, cached=cached, normed=normed)
        name = f"attention-{cached.replace(' ', '-')}-{'normed' if normed else 'plain'}"
        save(folder / name, attention.model)
        for number, (past, new) in enumerate([(0, 150), (150, 1), (300, 49)]):
            cache = [(random.normal(size=(1, 2, past, 48)) * 50).astype(attention.cached) for _ in range(2)]
            if cached == OWN_SCALES:
                of_rows = random.uniform(1e-3, 1, (2, 1, 2, past, 1)).astype(np.float32).view(np.int8)
                cache = [np.concatenate([rows, scale], -1) for rows, scale in zip(cache, of_rows, strict=True)]
            np.savez(
                folder / f"{name}.{number}.npz",
                q=random.normal(size=(1, new, sum(attention.widths))).astype(np.float32),
                pk=cache[0],
                pv=cache[1],
                lengths=np.array([past + new - 1], np.int32),
                total=np.array(past + new, np.int32),
            )
    return folder


def save(path: Path, model: ir.Model) -> None:
    path.with_suffix(".onnx").write_bytes(ir.to_proto(model).SerializeToString())


def digests(command: Sequence[str], cases: Path, library: Path, arithmetic: str = "") -> str:
    environment = {**os.environ, **({"EDGELM_KERNELS_ARITHMETIC": arithmetic} if arithmetic else {})}
    words = [*command, str(cases), str(library)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(list(cases.glob("*.npz")))
    return done.stdout


def variants() -> list[str]:
    """The instruction sets that have code and that this processor has."""
    names = ["avx512_vnni", "avx_vnni", "avx2", "asimddp", "asimd"]
    return [name for name in names if name in machine.instruction_sets()]


@pytest.mark.parametrize("name", variants())
def test_every_kind_of_processor_gets_the_same_bits(name: str, cases: Path) -> None:
    command = [sys.executable, str(RUNNER)]
    library = edgelm_kernels.library()
    assert digests(command, cases, library, name) == digests(command, cases, library)


def test_an_unknown_instruction_set_is_named_in_one_line() -> None:
    """Without an error, everything would run without kernels, and slowly."""
    command = "from edgelm.runtime.sessions import kernels; print(kernels.identity())"
    environment = {**os.environ, "EDGELM_KERNELS_ARITHMETIC": "avx3"}
    environment.pop("EDGELM_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "SessionError: EDGELM_KERNELS_ARITHMETIC='avx3' names no instruction set" in last


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_a_raspberry_pi_gets_the_same_bits(cpu: str, cases: Path) -> None:
    machines = pytest.importorskip("scripts.emulated.machines", reason="scripts/ is missing")
    if not machines.is_ready():
        missing("no emulated machines: scripts/arm_check.sh --prepare downloads QEMU and arm64 Debian")
    try:
        library = machines.kernels() / "edgelm_kernels" / "kernels.so"
    except machines.NotHereError as error:
        missing(str(error))
    emulated = digests(machines.command(cpu, str(RUNNER)), cases, library)
    assert emulated == digests([sys.executable, str(RUNNER)], cases, edgelm_kernels.library())
