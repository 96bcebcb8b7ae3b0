"""Matrices whose int8 values are stored in 4 to 6 bits: the layout, what function bodies and kernels compute with them,
and their rounding."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.export.codes.nibbles import Nibbles, load_nibbles, nibble_bytes, round_nibbles, save_nibbles
from edgelm.export.passes import quantizing_passes
from edgelm.export.passes.functions import BIASED, EDGELM, ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, WIDE
from edgelm.export.passes.graph import nodes_of
from edgelm.export.passes.narrow_functions import EMBEDDING, NARROW
from edgelm.export.passes.narrow_weights import NarrowWeights

from .test_passes import TIED, TOKENS, compute, floats, graph

pytest.importorskip("edgelm_kernels", reason="edgelm-kernels is not installed")
from .test_kernels import ALL_FRONTS, product_model, rows_of, session

Array = NDArray[Any]
SIZES = st.tuples(
    st.one_of(st.integers(1, 200), st.sampled_from([64, 576])),
    st.one_of(st.integers(1, 200), st.sampled_from([16, 128, 960])),
)


def random_nibbles(depth: int, columns: int, seed: int, bits: int = 4) -> Nibbles:
    random = np.random.default_rng(seed)
    blocks, levels = -(-depth // 32), 1 << bits
    zeros = random.integers(0, levels, (blocks, columns)).astype(np.uint8)
    most = np.minimum((1 << (8 - bits)) - 1, 127 // np.maximum(zeros, levels - 1 - zeros))
    steps = (1 + random.integers(0, 1 << 16, (blocks, columns)) % most).astype(np.uint8)
    drawn = random.integers(0, levels, (depth, columns)).astype(np.uint8)
    return Nibbles(drawn, steps, zeros, random.uniform(1e-4, 1, columns).astype(np.float32), bits=bits)


def narrowed(case: str, nibbles: Nibbles, folder: Path) -> tuple[ir.Model, ir.Model]:
    """A call of a product with an int8 matrix, and the same with few bits."""
    save_nibbles(nibbles, folder / "w.npz")
    models = []
    for _ in range(2):
        model = product_model(case, nibbles.values(), nibbles.scales)
        value = model.graph.initializers.pop("w")
        value.name = "w.int8"
        model.graph.register_initializer(value)
        models.append(model)
    assert NarrowWeights({"w": folder / "w.npz"})(models[1]).modified
    assert "w.int8" not in models[1].graph.initializers
    return models[0], models[1]


BITS = [4, 5, 6]


@pytest.mark.parametrize("bits", BITS)
def test_the_stored_order_is_the_documented_one(bits: int) -> None:
    nibbles = random_nibbles(70, 21, 0, bits)
    groups, factors, values = nibbles.groups(), nibbles.factors(), nibbles.values()
    assert groups.shape == (2, 3 * bits, 64) and factors.shape == (2, 3, 16)
    for k in range(96):
        for n in range(32):
            lines = groups[n // 16, k // 32 * bits : (k // 32 + 1) * bits, n % 16 * 4 + k % 4].astype(int)
            inside = k % 32
            q = int(lines[inside // 8]) >> (4 if inside % 8 >= 4 else 0) & 15
            q += sum((int(line) >> inside // 4 & 1) << place for place, line in enumerate(lines[4:], 4))
            factor = int(factors[n // 16, k // 32, n % 16])
            expected = values[k, n] if k < 70 and n < 21 else 0
            assert (q - (factor >> (8 - bits))) * (factor & ((1 << (8 - bits)) - 1)) == expected
    assert nibble_bytes(70, 21, bits) == groups.nbytes + factors.nbytes + nibbles.scales.nbytes


def test_a_matrix_survives_saving_and_loading(tmp_path: Path) -> None:
    nibbles = random_nibbles(40, 3, 1, 5)
    save_nibbles(nibbles, tmp_path / "x.npz")
    again = load_nibbles(tmp_path / "x.npz")
    for name in ("levels", "steps", "zeros", "scales", "error", "bits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(nibbles, name))


CASES = [ROWWISE_MATMUL, ROWWISE_MATMUL_TRANSPOSED, BIASED + ROWWISE_MATMUL]


@pytest.mark.parametrize("case", [*(case + bits for case in CASES for bits in ("", WIDE)), *ALL_FRONTS])
@pytest.mark.parametrize("width", BITS)
def test_a_body_of_few_bits_has_the_bits_of_its_int8_matrix(case: str, width: int, tmp_path: Path) -> None:
    depth, rows = 70, 5
    wide, narrow = narrowed(case, random_nibbles(depth, 37, 2, width), tmp_path)
    if case in ALL_FRONTS:
        feeds = rows_of(np.random.default_rng(3), case, rows, depth)
    else:
        feeds = {"x": np.random.default_rng(3).normal(size=(rows, depth)).astype(np.float32)}
    for expected, got in zip(*(session(model, False).run(None, feeds) for model in (wide, narrow)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", [biased + ROWWISE_MATMUL + bits for biased in ("", BIASED) for bits in ("", WIDE)])
@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    rows=st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 24, 97]), min_size=1, max_size=3),
    threads=st.tuples(st.integers(1, 4), st.booleans()),
    drawn=st.tuples(st.integers(0, 99), st.sampled_from(BITS)),
)
def test_a_kernel_of_few_bits_has_the_bits_of_its_body(
    name: str, sizes: tuple[int, int], rows: list[int], threads: tuple[int, bool], drawn: tuple[int, int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, model = narrowed(name, random_nibbles(*sizes, *drawn), Path(folder))
        model = ir.from_proto(ir.to_proto(model))
    body, kernel = session(model, False), session(model, True, *threads)
    random = np.random.default_rng(drawn[0])
    for count in rows:
        x = (random.normal(size=(count, sizes[0])) * 10.0 ** random.integers(-6, 6, (count, 1))).astype(np.float32)
        x[random.integers(count)] = 0
        (expected,), (got,) = body.run(None, {"x": x}), kernel.run(None, {"x": x})
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("case", ALL_FRONTS)
def test_norms_and_gates_give_the_same_bits_with_4_and_8_bit_weights(case: str, rows: int, tmp_path: Path) -> None:
    depth = 150
    wide, narrow = narrowed(case, random_nibbles(depth, 80, 4), tmp_path)
    feeds = rows_of(np.random.default_rng(rows), case, rows, depth)
    for expected, got in zip(*(session(model, True).run(None, feeds) for model in (wide, narrow)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows_of", ["", WIDE])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_largest_weights_do_not_overflow(bits: int, upper: bool, rows_of: str, tmp_path: Path) -> None:
    """The largest levels and steps against the largest and smallest values, including -128 in the low plane."""
    most = (1 << bits) - 1
    zero, step = (0 if upper else most), 127 // most
    levels, blocks = np.full((256, 80), most - zero, np.uint8), (8, 80)
    filled = (np.full(blocks, value, np.uint8) for value in (step, zero))
    _, model = narrowed(
        ROWWISE_MATMUL + rows_of, Nibbles(levels, *filled, np.ones(80, np.float32), bits=bits), tmp_path
    )
    x = np.full((12, 256), -(127 * 256 - 128) / 32512 if rows_of else -1, np.float32)
    x[:, 0] = 1
    for sign in (1, -1):
        for rows in (1, 12):
            (expected,), (got,) = (session(model, way).run(None, {"x": sign * x[:rows]}) for way in (False, True))
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", BITS)
def test_head_and_embedding_share_few_bits(bits: int, tmp_path: Path) -> None:
    """40 tokens of 32 values: body and kernel give the same as the int8 table."""
    table = floats(40, 32)
    nibbles = round_nibbles(np.ascontiguousarray(table.T), bits=bits)
    save_nibbles(nibbles, tmp_path / "t.npz")
    exact = np.ascontiguousarray((nibbles.values() * nibbles.scales).T)
    ids = np.array([[0, 39, 15, 16, 7], [16, 16, 31, 32, 1]], np.int64)
    model = graph(TOKENS, TIED, {"table": exact})
    for work in quantizing_passes("int4-rowwise", 8, {}, narrow={"table": tmp_path / "t.npz"}):
        work(model)
    calls = [node.op_type for node in model.graph if node.domain == EDGELM]
    assert sorted(calls) == sorted([NARROW[bits] + EMBEDDING, NARROW[bits] + ROWWISE_MATMUL])
    (embedding,) = nodes_of(model, NARROW[bits] + EMBEDDING)
    model.graph.outputs.append(embedding.outputs[0])
    logits, rows = compute(model, {"input_ids": ids})
    np.testing.assert_array_equal(rows, exact[ids])
    again = session(model, True).run(None, {"input_ids": ids})
    np.testing.assert_array_equal(again[0], logits)
    np.testing.assert_array_equal(again[1], rows)


def test_a_graph_with_another_shape_is_refused(tmp_path: Path) -> None:
    _, model = narrowed(ROWWISE_MATMUL, random_nibbles(64, 32, 5), tmp_path)
    (node,) = nodes_of(model, NARROW[4] + ROWWISE_MATMUL)
    node.attributes["depth"] = ir.AttrInt64("depth", 65)
    with pytest.raises(Exception, match="groups of 16 columns"):
        session(model, True)


# Rounding


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("bits", BITS)
def test_rounded_weights_are_within_the_limit_and_near(bits: int, limit: int) -> None:
    matrix = floats(96, 40) * np.geomspace(1e-3, 1e3, 40, dtype=np.float32)
    matrix[:, 3] = 0
    matrix[40:50, 5] *= 30
    nibbles = round_nibbles(matrix, limit=limit, bits=bits)
    values = nibbles.values().astype(np.float32)
    assert np.abs(values).max() <= limit
    assert not values[:, 3].any()
    ranges = np.ptp(matrix.reshape(3, 32, 40), axis=1)
    # Half of a sixteenth of a block's range, plus the error of fitting its step to the column's grid.
    error = np.abs(values * nibbles.scales - matrix).reshape(3, 32, 40).max(axis=1)
    plain = np.arange(40) != 5
    assert (error <= 0.1 * ranges)[:, plain].all()


def test_gptq_makes_products_more_exact_than_the_nearest_values() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 64)) @ random.normal(size=(64, 64))
    matrix = random.normal(size=(64, 30)).astype(np.float32)
    hessian = (x.T @ x / len(x)).astype(np.float32)
    nearest, better = (round_nibbles(matrix, given) for given in (None, hessian))

    def loss(nibbles: Nibbles) -> float:
        return float(np.square(x @ (nibbles.values() * nibbles.scales - matrix)).mean())

    assert loss(better) < 0.6 * loss(nearest)
