"""INT8 in torch: onnxruntime's products bit for bit, and gradients that ignore the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgelm.export.codes.nibbles import WIDTHS, round_nibbles, save_nibbles
from edgelm.export.compress.training.grids import Levels, fitting_blocks
from edgelm.export.compress.training.simulate import Quantized, product, round_rows
from edgelm.export.passes.narrow_weights import NarrowWeights
from edgelm.export.passes.quantize_linears import QuantizeLinears
from edgelm.export.passes.widen_activations import WidenActivations
from edgelm.runtime.host.machine import saturates_int8
from edgelm.runtime.host.ort import load_onnxruntime

from .conftest import tiny_llama


@pytest.fixture
def quantized_matmul(tmp_path: Path) -> Callable[..., Any]:
    """x @ weight in onnxruntime, after the pass that quantizes bundles."""

    def run(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], limit: int, planes: int, bits: int = 8) -> Any:
        kinds = [("x", ["rows", weight.shape[0]]), ("y", ["rows", weight.shape[1]])]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in kinds]
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
        graph = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(weight, "w")])
        model = ir.serde.deserialize_model(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        )
        QuantizeLinears("int8-rowwise", limit)(model)
        if bits in WIDTHS:
            save_nibbles(round_nibbles(weight, limit=limit, bits=bits), tmp_path / "w.npz")
            NarrowWeights({"w": tmp_path / "w.npz"})(model)
        if planes == 2:
            WidenActivations(["w"])(model)
        ir.save(model, tmp_path / "m.onnx")
        session = load_onnxruntime().InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    return run


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 300), (64, 96), (577, 50), (1536, 64), (3000, 16)])
def test_product_is_onnxruntimes_bit_for_bit(
    inputs: int, outputs: int, planes: int, quantized_matmul: Callable[..., Any]
) -> None:
    random = np.random.default_rng(inputs)
    x = (random.standard_normal((40, inputs)) * random.lognormal(0, 3, (40, 1))).astype(np.float32)
    weight = (random.standard_normal((inputs, outputs)) * random.lognormal(0, 1, outputs)).astype(np.float32)
    x[0], weight[:, 0], x[1, 2] = 0, 0, 500
    x[2] = np.linspace(-1, 1, inputs)  # some values lie halfway between two steps
    for limit in (127, 63):
        # AVX2 without VNNI saturates sums of products of 8-bit weights; 7-bit weights cannot saturate.
        if limit == 63 or not saturates_int8():
            ours = product(torch.tensor(x), torch.tensor(weight), Levels(limit), planes).numpy()
            assert np.array_equal(ours, quantized_matmul(x, weight, limit, planes))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (577, 50), (1536, 64)])
def test_products_of_4_to_6_bits_are_onnxruntimes_bit_for_bit(
    inputs: int, outputs: int, bits: int, planes: int, quantized_matmul: Callable[..., Any]
) -> None:
    random = np.random.default_rng(inputs + bits)
    x = (random.standard_normal((20, inputs)) * random.lognormal(0, 3, (20, 1))).astype(np.float32)
    weight = (random.standard_normal((inputs, outputs)) * random.lognormal(0, 1, outputs)).astype(np.float32)
    x[0], weight[:, 0] = 0, 0
    limit = 63 if saturates_int8() else 127
    matrix = torch.tensor(weight)
    ours = product(torch.tensor(x), matrix, fitting_blocks(matrix, bits, limit), planes).numpy()
    assert np.array_equal(ours, quantized_matmul(x, weight, limit, planes, bits))


def test_blocks_stay_while_weights_move_and_weights_stay_within_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 6, generator=generator)
    grid = fitting_blocks(weight, 4)
    first, scales = grid.nearest(weight)
    assert torch.equal(grid.nearest(first * scales)[0], first), "what lies on the grid stays there"
    moved, same = grid.nearest(weight * 3)
    assert torch.equal(same, scales)
    assert (moved * scales).abs().max() <= 1.5 * weight.abs().max()
    some = torch.tensor([4, 1])
    assert torch.equal(grid.columns(some).nearest(weight[:, some])[0], first[:, some])


def test_16_bits_are_256_times_as_fine() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(40, 64, generator=generator),
        torch.randint(-127, 128, (64, 32), generator=generator).float(),
    )
    weight[0] = 127  # so that rounding does not change the weights
    coarse, fine = (float((product(x, weight, planes=planes) - x @ weight).abs().max()) for planes in (1, 2))
    assert fine < coarse / 100


def test_gradients_ignore_the_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=generator).requires_grad_()
    weight = torch.randn(32, 8, generator=generator).requires_grad_()
    upstream = torch.randn(3, 5, 8, generator=generator)
    (product(x, weight) * upstream).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    plain = torch.einsum("abi,abo->io", x.detach(), upstream)
    assert torch.allclose(x.grad, upstream @ weight.detach().t(), atol=0.1)
    assert torch.allclose(weight.grad, plain, atol=0.1)
    rows = torch.randn(4, 16, generator=generator).requires_grad_()
    round_rows(rows).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.ones(4, 16))


def test_simulation_covers_linear_layers_of_every_form() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    for module in (
        tiny_llama(),
        tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval(),
    ):
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            plain = module(ids, use_cache=False).logits
            with Quantized(module, activation_bits=8):
                simulated = module(ids, use_cache=False).logits
            assert torch.equal(plain, module(ids, use_cache=False).logits)
            with Quantized(module, weight_bits=4):
                narrow = module(ids, use_cache=False).logits
        assert 0 < float((plain - simulated).abs().max()) < 0.2 * float(plain.abs().max())
        assert float((plain - simulated).abs().mean()) < float((plain - narrow).abs().mean())
