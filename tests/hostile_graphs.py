"""Graphs that call kernels with inputs that no export writes. Runs them all in a process of its own.

python -m tests.hostile_graphs [--arithmetics]

Prints a line for each case: its name, and "computed" or the first line of the error. A graph may come from anywhere:
none may crash the process or access memory outside its own arrays.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from edgelm.export.passes.functions import EDGELM
from edgelm.export.passes.graph import MICROSOFT
from edgelm.runtime.host import machine
from edgelm.runtime.host.ort import load_onnxruntime
from edgelm.runtime.sessions import kernels

from .test_passes import Array, graph

# The instruction sets that have code.
ARITHMETICS = ("avx512_vnni", "avx_vnni", "avx2", "asimddp", "asimd")
HEADS, GROUPS, SIZE, NEW, PAST = 4, 2, 16, 3, 40


class Case(NamedTuple):
    """A graph with its inputs; expected: a part of the error, or None if it computes."""

    name: str
    build: Callable[[], tuple[ir.Model, dict[str, Array]]]
    expected: str | None


def attention(**changes: Any) -> tuple[ir.Model, dict[str, Array]]:
    """A call of attention on an INT8 cache, and its inputs. `changes` replaces inputs by name with arrays, or with None
    to leave one out; `name` and `attributes` too."""
    random, width = np.random.default_rng(0), (HEADS + 2 * GROUPS) * SIZE
    arrays: dict[str, Any] = {
        "q": random.normal(size=(1, NEW, width)).astype(np.float32),
        "k": None,
        "v": None,
        "pk": np.zeros((1, GROUPS, PAST, SIZE), np.int8),
        "pv": np.zeros((1, GROUPS, PAST, SIZE), np.int8),
        "lengths": np.array([NEW - 1], np.int32),
        "total": np.array(NEW, np.int32),
        "cos": np.ones((64, SIZE // 2), np.float32),
        "sin": np.zeros((64, SIZE // 2), np.float32),
        "positions": None,
        "bias": None,
        "sink": None,
        "ks": np.full(GROUPS * SIZE, 0.02, np.float32),
        "vs": np.full(GROUPS * SIZE, 0.02, np.float32),
        "start": None,
    }
    name = changes.pop("name", "GroupQueryAttention")
    attributes = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1, "kv_cache_bit_width": 8}
    attributes |= changes.pop("attributes", {})
    arrays |= changes
    text = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    text += ', k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL"'
    constants = {"ks", "vs", "k", "v"} if "epsilon" in attributes else {"ks", "vs"}
    return call(name, text, arrays, constants, {"y": "float", "key": "int8", "value": "int8"})


def product(name: str, attributes: str = "", outputs: str = "y", **arrays: Any) -> tuple[ir.Model, dict[str, Array]]:
    """A call of a product with its inputs in order; all but x and skip are constant."""
    constants = set(arrays) - {"x", "skip"}
    return call(name, attributes, arrays, constants, dict.fromkeys(outputs.split(", "), "float"))


def call(
    name: str, attributes: str, arrays: dict[str, Any], constants: set[str], outputs: dict[str, str]
) -> tuple[ir.Model, dict[str, Array]]:
    kinds = {"float32": "float", "int64": "int64", "int32": "int32", "int8": "int8"}
    names = [key if array is not None else "" for key, array in arrays.items()]
    while not names[-1]:
        names.pop()
    feeds = {key: array for key, array in arrays.items() if array is not None and key not in constants}
    signature = ", ".join(f"{kinds[array.dtype.name]}{sizes(key, array)} {key}" for key, array in feeds.items())
    weights = {key: arrays[key] for key in constants if arrays[key] is not None}
    given = f"<{attributes}> " if attributes else ""
    typed = ", ".join(f"{kind} {output}" for output, kind in outputs.items())
    body = f"{', '.join(outputs)} = {EDGELM}.{name} {given}({', '.join(names)})"
    return graph(f"{signature} -> {typed}", body, weights, (EDGELM, MICROSOFT)), feeds


def sizes(name: str, array: Array) -> str:
    """The shape of an input in onnx's text form: symbolic, except for the length of a cache's rows."""
    names = [f"{name}{axis}" for axis in range(array.ndim)]
    if name == "pk" and array.ndim == 4:
        names[3] = str(array.shape[3])
    return f"[{','.join(names)}]" if names else ""


def zeros(*shape: int, kind: type = np.float32) -> Array:
    return np.zeros(shape, kind)


def lengths(*values: int) -> Array:
    return np.array(values, np.int32)


WIDTH = (HEADS + 2 * GROUPS) * SIZE
SEPARATE = {
    "q": zeros(1, NEW, HEADS * SIZE),
    "k": zeros(1, NEW, GROUPS * SIZE),
    "v": zeros(1, NEW, GROUPS * SIZE),
}
EMPTY = {
    "q": zeros(0, NEW, WIDTH),
    "pk": zeros(0, GROUPS, PAST, SIZE, kind=np.int8),
    "pv": zeros(0, GROUPS, PAST, SIZE, kind=np.int8),
    "lengths": lengths(),
}
NOTHING = zeros(0, GROUPS, 0, SIZE, kind=np.int8)
NORMS = {"name": "NormedGroupQueryAttention", "attributes": {"epsilon": 0.01}}
KEPT = "KeptGroupQueryAttention"
INT64 = np.int64
# Replaced inputs or attributes of attention, and a part of the expected error.
ATTENTION: list[tuple[str, dict[str, Any], str | None]] = [
    ("nothing wrong", {}, None),
    ("separate", SEPARATE, None),
    ("a wide table", {"cos": zeros(64, 40), "sin": zeros(64, 40)}, "tables by positions"),
    ("a flat table", {"cos": zeros(64), "sin": zeros(64)}, "tables by positions"),
    ("tables of two sizes", {"sin": zeros(2, SIZE // 2)}, "tables by positions"),
    ("a short table", {"cos": zeros(2, 8), "sin": zeros(2, 8)}, "have no angles"),
    ("no table", {"cos": None, "sin": None}, "input 7 must be there"),
    ("no lengths", {"lengths": None}, "input 5 must be there"),
    ("no total", {"total": None}, "input 6 must be there"),
    ("too few lengths", {"lengths": lengths()}, "has a length"),
    ("too many lengths", {"lengths": lengths(2, 2)}, "has a length"),
    ("no number of positions", {"total": lengths()}, "one number"),
    ("negative positions", {"total": np.array(-5, np.int32)}, "number of positions"),
    ("positions without end", {"total": np.array(2**31 - 1, np.int32)}, "number of positions"),
    ("a length without end", {"lengths": lengths(2**31 - 1), "total": lengths(9)}, "are not there"),
    ("a negative length", {"lengths": lengths(-(2**31)), "total": lengths(9)}, "are not there"),
    ("a length behind the cache", {"lengths": lengths(PAST + 1), "total": lengths(9)}, "are not there"),
    ("short keys", {**SEPARATE, "k": zeros(1, 1, GROUPS * SIZE)}, "another shape than the query"),
    ("narrow values", {**SEPARATE, "v": zeros(1, NEW, SIZE)}, "another shape than the query"),
    ("no values", {**SEPARATE, "v": None}, "another shape than the query"),
    ("flat keys", {**SEPARATE, "k": zeros(NEW)}, "another shape than the query"),
    ("a narrow query", {"q": zeros(1, NEW, SIZE)}, "another size than its heads"),
    ("a flat query", {"q": zeros(NEW, WIDTH)}, "three axes"),
    ("a batch of two in a cache of one", {"q": zeros(2, NEW, WIDTH), "lengths": lengths(2, 2)}, "four axes"),
    ("a cache of one group", {"pk": zeros(1, 1, PAST, SIZE, kind=np.int8)}, "four axes"),
    ("a flat cache", {"pk": zeros(PAST, SIZE, kind=np.int8)}, "four axes"),
    ("no cache", {"pk": None, "pv": None}, ""),
    ("values of another length", {"pv": zeros(1, GROUPS, 2, SIZE, kind=np.int8)}, "have one shape"),
    ("no cached values", {"pv": None}, "input 4 must be there"),
    ("narrow rows", {"pk": zeros(1, GROUPS, PAST, 8, kind=np.int8)}, ""),
    ("empty heads", {"pk": zeros(1, GROUPS, PAST, 0, kind=np.int8), "ks": zeros(0), "vs": zeros(0)}, "size of a head"),
    ("scales of another size", {"ks": zeros(5)}, "a scale for each channel"),
    ("no scales", {"ks": None, "vs": None}, "must be there"),
    ("positions", {"positions": zeros(1, NEW, kind=INT64).astype(np.float32)}, "belongs to com.microsoft"),
    ("a bias", {"bias": zeros(1, 1, NEW, NEW)}, "belongs to com.microsoft"),
    ("a sink", {"sink": zeros(HEADS)}, "belongs to com.microsoft"),
    ("no heads", {"attributes": {"num_heads": 0}}, "number of heads"),
    ("heads without end", {"attributes": {"num_heads": 2**62, "kv_num_heads": 2**62}}, "number of heads"),
    ("negative groups", {"attributes": {"kv_num_heads": -2}}, "number of groups"),
    ("uneven groups", {"attributes": {"kv_num_heads": 3}}, "multiple of groups"),
    ("a window without end", {"attributes": {"local_window_size": 2**62}}, None),
    ("a window of nothing", {"attributes": {"local_window_size": -(2**62)}}, None),
    ("norms", {**NORMS, "k": zeros(SIZE), "v": zeros(SIZE)}, None),
    ("short norms", {**NORMS, "k": zeros(2), "v": zeros(SIZE)}, "a weight for each value of a head"),
    ("no norms", NORMS, "must be constant"),
    ("no start", {"name": KEPT}, None),
    ("an empty start", {"name": KEPT, "start": zeros(0, kind=INT64)}, "one number"),
    ("a start without end", {"name": KEPT, "start": np.array([-(2**63)])}, None),
    ("no batch", EMPTY, None),
    ("no batch and no past", {**EMPTY, "pk": NOTHING, "pv": NOTHING}, None),
    ("no new rows", {"q": zeros(1, 0, WIDTH), "lengths": lengths(4), "total": lengths(5)}, None),
    ("NaN", {"q": np.full((1, NEW, WIDTH), np.nan, np.float32)}, "NaN or infinite"),
    ("infinity", {"q": np.full((1, NEW, WIDTH), np.inf, np.float32)}, "NaN or infinite"),
    ("more rows than a tile", {"q": zeros(1, 30, WIDTH), "lengths": lengths(29), "total": lengths(30)}, None),
]  # fmt: skip
W, S = np.ones((8, 5), np.int8), np.ones(5, np.float32)
DEEP = np.ones((70000, 1), np.int8)
G = np.ones(8, np.float32)
NORMED = {"attributes": "epsilon = 0.1", "outputs": "y, total", "x": zeros(2, 8), "skip": zeros(2, 8)}
MATRIX = {"g": G, "w": W, "s": S}
PRODUCTS: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("nothing wrong", "RowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": S}, None),
    ("a vector as matrix", "RowwiseMatMul", {"x": zeros(2, 8), "w": W[0], "s": S}, "are a matrix"),
    ("a cube as matrix", "RowwiseMatMul", {"x": zeros(2, 8), "w": W[None], "s": S}, "are a matrix"),
    ("few scales", "RowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": S[:2]}, "a scale for each column"),
    ("scales in two axes", "RowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": S[None]}, "a scale for each column"),
    ("no depth", "RowwiseMatMul", {"x": zeros(2, 0), "w": W[:0], "s": S}, "depth of a product"),
    ("too deep", "RowwiseMatMul", {"x": zeros(2, 8), "w": DEEP, "s": S[:1]}, "depth of a product"),
    ("no columns", "RowwiseMatMul16", {"x": zeros(2, 8), "w": W[:, :0], "s": S[:0]}, "columns of a product"),
    ("a number as rows", "RowwiseMatMul", {"x": np.array(1, np.float32), "w": W, "s": S}, "8 values are multiplied"),
    ("short rows", "RowwiseMatMul16", {"x": zeros(2, 7), "w": W, "s": S}, "8 values are multiplied"),
    ("no rows", "RowwiseMatMul16", {"x": zeros(0, 8), "w": W, "s": S}, None),
    ("no rows in between", "RowwiseMatMul", {"x": zeros(3, 0, 8), "w": W, "s": S}, None),
    ("no scales", "RowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": None}, ""),
    ("a matrix that is computed", "RowwiseMatMul", {"x": zeros(2, 8), "skip": W, "s": S}, "must be constant"),
    ("another head", "RowwiseMatMulTransposed", {"x": zeros(2, 8), "w": W, "s": S}, "a scale for each column"),
    ("half a gate", "GatedRowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": S}, "rows of 16 values"),
    ("a short norm", "NormedRowwiseMatMul", {**NORMED, **MATRIX, "g": G[:3]}, "a weight for each"),
    ("a short sum", "NormedRowwiseMatMul16", {**NORMED, **MATRIX, "skip": zeros(1, 8)}, "of one shape"),
    ("no sum", "NormedRowwiseMatMul", {**NORMED, **MATRIX, "outputs": "y"}, ""),
    ("few biases", "BiasedRowwiseMatMul", {"x": zeros(2, 8), "w": W, "s": S, "b": S[:4]}, "a bias for each column"),
    ("a computed bias", "BiasedRowwiseMatMul16", {"x": zeros(2, 8), "w": W, "s": S, "skip": S}, "must be constant"),
    ("a short post norm", "PostNormedRowwiseMatMul", {**NORMED, "p": G[:1], **MATRIX}, "a weight for each"),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """All graphs with their expected errors."""
    for name, changes, expected in ATTENTION:
        yield Case(f"attention: {name}", lambda changes=changes: attention(**changes), expected)
    for name, function, arrays, expected in PRODUCTS:
        yield Case(f"product: {name}", lambda kind=function, arrays=arrays: product(kind, **arrays), expected)


def run(model: ir.Model, feeds: dict[str, Array], threads: int, own_threads: bool) -> str:
    """Run a graph with an allocation for each array, which a sanitizer can watch; returns the result or the error."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    kernels.register(options, threads, own_threads)
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, feeds)
    except Exception as error:  # noqa: BLE001  onnxruntime raises many types
        return str(error).splitlines()[0]
    return "computed"


def main() -> None:
    if "--arithmetics" in sys.argv:
        print("\n".join(name for name in ARITHMETICS if name in machine.instruction_sets()))
        return
    for case in cases():
        for threads, own_threads in itertools.product((1, 3), (True, False)):
            said = run(*case.build(), threads, own_threads)
            print(case.name, said, sep="\t", flush=True)


if __name__ == "__main__":
    main()
