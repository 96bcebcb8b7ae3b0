"""Random graphs that call one kernel, valid and invalid."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np

from tests import hostile_graphs as graphs

NAMES = ("RowwiseMatMul", "RowwiseMatMulTransposed", "GatedRowwiseMatMul", "GeluGatedRowwiseMatMul")


def random_graph(source: random.Random) -> None:
    """Run a graph; any result or message of onnxruntime is an answer. Does nothing without kernels."""
    if importlib.util.find_spec("edgelm_kernels") is None:
        return
    model, feeds = _attention(source) if source.random() < 0.5 else _product(source)
    said = graphs.run(model, feeds, source.randint(1, 4), source.random() < 0.5)
    assert said, "neither a result nor an error"


def _array(source: random.Random, kind: type, *shape: int) -> Any:
    generator = np.random.default_rng(source.randrange(1 << 30))
    if kind is np.int8:
        return generator.integers(-127, 128, shape).astype(np.int8)
    values = generator.normal(size=shape).astype(np.float32)
    if values.size and source.random() < 0.1:
        values.flat[source.randrange(values.size)] = source.choice((np.nan, np.inf, -np.inf, 3e38, 1e-42))
    return values


def _spoilt(source: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape, occasionally with a changed size, or with an axis more or less."""
    if source.random() < 0.85:
        return shape
    sizes = list(shape)
    kind, place = source.randrange(4), source.randrange(max(1, len(sizes)))
    if kind == 0 and sizes:
        sizes[place] = source.choice((0, 1, sizes[place] + 1, max(0, sizes[place] - 1), 2 * sizes[place]))
    elif kind == 1:
        sizes.insert(place, 1)
    elif kind == 2 and sizes:
        sizes.pop(place)
    return tuple(sizes)


def _product(source: random.Random) -> tuple[Any, Any]:
    depth, columns, rows = source.randint(1, 300), source.randint(1, 600), source.choice((0, 1, 2, 5, 7, 9, 12, 16, 40))
    name = source.choice(NAMES)
    width = 2 * depth if "Gated" in name else depth
    matrix = (columns, depth) if "Transposed" in name else (depth, columns)
    return graphs.product(
        name + source.choice(("", "16")),
        x=_array(source, np.float32, *_spoilt(source, (rows, width))),
        w=_array(source, np.int8, *_spoilt(source, matrix)),
        s=np.abs(_array(source, np.float32, *_spoilt(source, (columns,)))),
    )


def _attention(source: random.Random) -> tuple[Any, Any]:
    groups, size = source.randint(1, 4), source.choice((8, 16, 24, 64, 80))
    heads, batch = groups * source.randint(1, 5), source.choice((0, 1, 1, 1, 3))
    new, past = source.choice((0, 1, 2, 9, 40, 140)), source.choice((0, 1, 130, 300))
    capacity, half = source.choice((past, past + new, 400)), source.randint(0, size // 2)
    cache = _spoilt(source, (batch, groups, capacity, size))
    total = past + new + source.choice((0, 0, 0, 0, 1, -1, 1000))
    angles = _spoilt(source, (source.choice((512, past + new)), half))
    return graphs.attention(
        q=_array(source, np.float32, *_spoilt(source, (batch, new, (heads + 2 * groups) * size))),
        pk=_array(source, np.int8, *cache),
        pv=_array(source, np.int8, *_spoilt(source, cache)),
        lengths=np.full(_spoilt(source, (batch,)), past + new - 1 + source.choice((0, 0, 0, 5, -300)), np.int32),
        total=np.array(total, np.int32),
        cos=_array(source, np.float32, *angles),
        sin=_array(source, np.float32, *_spoilt(source, angles)),
        ks=np.abs(_array(source, np.float32, *_spoilt(source, (groups * size,)))) + np.float32(0.01),
        vs=np.abs(_array(source, np.float32, *_spoilt(source, (groups * size,)))) + np.float32(0.01),
        attributes={
            "num_heads": heads,
            "kv_num_heads": groups,
            "do_rotary": source.randint(0, 1),
            "local_window_size": source.choice((-1, 1, 7, 200)),
        },
    )
