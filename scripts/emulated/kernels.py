"""One matrix product of 576 x 1,536, as the schemes and other exporters write it, for counting instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

INPUTS, OUTPUTS = 576, 1536
_BLOCK = 32
_MICROSOFT = "com.microsoft"


def write(folder: Path) -> dict[str, Path]:
    """Write a graph for each way, y (rows, 1536) = x (rows, 576) @ w; returns their paths."""
    weight = np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    ways = {"int8-rowwise": _rowwise, "int8-tensor": _tensor, "fp32": _fp32, "MatMulNBits": _blocks}
    folder.mkdir(exist_ok=True)
    for name, way in ways.items():
        nodes, weights = way(weight)
        x, y = (
            helper.make_tensor_value_info(key, TensorProto.FLOAT, ["rows", size])
            for key, size in (("x", INPUTS), ("y", OUTPUTS))
        )
        initializers = [numpy_helper.from_array(np.asarray(array), key) for key, array in weights.items()]
        graph = helper.make_graph(nodes, name, [x], [y], initializers)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in ways}


Way = tuple[list[onnx.NodeProto], dict[str, Any]]


def _fp32(weight: NDArray[np.float32]) -> Way:
    return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}


def _tensor(weight: NDArray[np.float32]) -> Way:
    scale = np.float32(np.abs(weight).max() / 127)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain=_MICROSOFT)
    return [node], {"w": np.round(weight / scale).astype(np.int8), "s": scale}


def _rowwise(weight: NDArray[np.float32]) -> Way:
    """As docs/bundle.md writes it."""
    scales = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    product = ["q", "w", "step", "s", "zero"]
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", "axis"], ["m"], keepdims=1),
        helper.make_node("Max", ["m", "least"], ["r"]),
        helper.make_node("Div", ["x", "r"], ["n"]),
        helper.make_node("QuantizeLinear", ["n", "step", "zero"], ["q"]),
        helper.make_node("MatMulIntegerToFloat", product, ["z"], domain=_MICROSOFT),
        helper.make_node("Mul", ["z", "r"], ["y"]),
    ]
    weights = {
        "w": np.round(weight / scales).astype(np.int8),
        "s": scales,
        "axis": np.array([-1], np.int64),
        "least": np.float32(1e-30),
        "step": np.float32(1 / 127),
        "zero": np.uint8(128),
    }
    return nodes, weights


def _blocks(weight: NDArray[np.float32]) -> Way:
    """8 bits, one scale for 32 inputs of an output: what onnxruntime-genai's exporter writes."""
    blocks = weight.T.reshape(OUTPUTS, INPUTS // _BLOCK, _BLOCK)
    scales = (np.abs(blocks).max(axis=2) / 127).astype(np.float32)
    codes = (np.round(blocks / scales[..., None]) + 128).clip(0, 255).astype(np.uint8)
    sizes = {"K": INPUTS, "N": OUTPUTS, "bits": 8, "block_size": _BLOCK}
    return [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=_MICROSOFT, **sizes)], {
        "w": codes,
        "s": scales,
    }
