"""The functions of the domain `edgelm`, which compiled kernels may compute.

Each function has a body in the file, of onnxruntime's own operators. If a kernel is registered under its name,
onnxruntime uses the kernel; otherwise it inlines the body before it optimizes. The texts below are the specification of
the kernels.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import onnx.parser
import onnx_ir as ir

from .attention_functions import ATTENTION_TEXTS, NORMED
from .graph import MICROSOFT, Builder, use_domain
from .narrow_functions import EMBEDDING_TEXTS, NARROW, matrix_of_nibbles

EDGELM = "edgelm"
ROWWISE_MATMUL = "RowwiseMatMul"
ROWWISE_MATMUL_TRANSPOSED = "RowwiseMatMulTransposed"
NORMED_ROWWISE_MATMUL = "NormedRowwiseMatMul"
POST_NORMED_ROWWISE_MATMUL = "PostNormedRowwiseMatMul"
GATED_ROWWISE_MATMUL = "GatedRowwiseMatMul"
GELU_GATED_ROWWISE_MATMUL = "GeluGatedRowwiseMatMul"
# Suffix of a product whose rows are quantized to 16 bits: same inputs, outputs and attributes.
WIDE = "16"
# Prefix of a product with a bias for each column, one more input, which is added at the end.
BIASED = "Biased"
# x float32 (..., K), weight int8 (K, N), scales float32 (N), y float32 (..., N).
# The zero point is cast from int32, since onnxruntime merges equal int32 constants but not uint8 ones: otherwise calls
# that share x would each quantize it.
# A row of zeros divides by zero. Its NaN become some uint8, the product is finite, and times 0 it is 0. A guard would
# be one more operator for each matrix, 3 % of a decode step of the reference model.
_PRODUCT = f"""
    axis = Constant<value_ints = [-1]>()
    step = Constant<value_float = {1 / 127!r}>()
    middle = Constant<value_int = 128>()
    zero_point = Cast<to = {ir.DataType.UINT8.value}>(middle)
    magnitudes = Abs(%(x)s)
    largest = ReduceMax<keepdims = 1>(magnitudes, axis)
    shares = Div(%(x)s, largest)
    values = QuantizeLinear(shares, step, zero_point)
    product = {MICROSOFT}.MatMulIntegerToFloat(values, %(weight)s, step, scales, zero_point)
"""
# The same with 16 bits, as two planes of 8: the remainder of the first is quantized again, with steps 256 times finer.
# Both are rows of one integer product, which reads the matrix once.
_WIDE_PRODUCT = f"""
    axis = Constant<value_ints = [-1]>()
    step = Constant<value_float = {1 / 127!r}>()
    low_step = Constant<value_float = {1 / 32512!r}>()
    part = Constant<value_float = {1 / 256!r}>()
    middle = Constant<value_int = 128>()
    zero_point = Cast<to = {ir.DataType.UINT8.value}>(middle)
    magnitudes = Abs(%(x)s)
    largest = ReduceMax<keepdims = 1>(magnitudes, axis)
    shares = Div(%(x)s, largest)
    high = QuantizeLinear(shares, step, zero_point)
    covered = DequantizeLinear(high, step, zero_point)
    rest = Sub(shares, covered)
    low = QuantizeLinear(rest, low_step, zero_point)
    planes = Concat<axis = 0>(high, low)
    products = {MICROSOFT}.MatMulIntegerToFloat(planes, %(weight)s, step, scales, zero_point)
    high_product, low_product = Split<axis = 0, num_outputs = 2>(products)
    low_part = Mul(low_product, part)
    product = Add(high_product, low_part)
"""
_SCALED = "y = Mul(product, largest)"
# NaN and infinity are lost in the integers, and ReduceMax ignores NaN. So the sum of the row times 0, which is NaN if
# there is one and else 0, is added to the factor of the product.
_GUARDED = """
    zero = Constant<value_float = 0.0>()
    zeros = Mul(%(x)s, zero)
    nothing = ReduceSum<keepdims = 1>(zeros, axis)
    factor = Add(largest, nothing)
    y = Mul(product, factor)
"""


class _Front(NamedTuple):
    """The part of a product's function before the multiplication: signature, statements, and the names of its
    operands."""

    signature: str
    statements: str = ""
    x: str = "x"
    weight: str = "weight"
    # How the row's scale is multiplied in. Behind a norm there is no guard: one NaN makes the whole row NaN, which
    # ReduceMax keeps, and infinity stays in the sum. A guard would cost 2 % of a decode step for nothing.
    scaled: str = _GUARDED


_FRONTS = {
    ROWWISE_MATMUL: _Front("(x, weight, scales) => (y)"),
    # weight int8 (N, K).
    ROWWISE_MATMUL_TRANSPOSED: _Front(
        "(x, weight, scales) => (y)", "turned = Transpose<perm = [1, 0]>(weight)", weight="turned"
    ),
    # x, skip and total, their sum, (batch, new, K); norm (K).
    NORMED_ROWWISE_MATMUL: _Front(
        "<epsilon> (x, skip, norm, weight, scales) => (y, total)",
        f"normed, , , total = {MICROSOFT}.SkipSimplifiedLayerNormalization <epsilon: float = @epsilon> (x, skip, norm)",
        x="normed",
        scaled=_SCALED,
    ),
    # The same with a norm of skip, with the weights post (K): a norm behind a layer, and one in front of the next.
    POST_NORMED_ROWWISE_MATMUL: _Front(
        "<epsilon> (x, skip, post, norm, weight, scales) => (y, total)",
        f"""added = SimplifiedLayerNormalization <axis = -1, stash_type = 1, epsilon: float = @epsilon> (skip, post)
        normed, , , total = {MICROSOFT}.SkipSimplifiedLayerNormalization
            <epsilon: float = @epsilon> (x, added, norm)""",
        x="normed",
        scaled=_SCALED,
    ),
    # x (..., 2 K): silu of the first half, times the second half.
    GATED_ROWWISE_MATMUL: _Front(
        "(x, weight, scales) => (y)",
        """gate, up = Split<axis = -1, num_outputs = 2>(x)
        opening = Sigmoid(gate)
        silu = Mul(gate, opening)
        gated = Mul(silu, up)""",
        x="gated",
    ),
    # The same with GELU, exact or by tanh, as the attribute of ONNX's operator says.
    GELU_GATED_ROWWISE_MATMUL: _Front(
        "<approximate> (x, weight, scales) => (y)",
        """gate, up = Split<axis = -1, num_outputs = 2>(x)
        gelu = Gelu<approximate: string = @approximate>(gate)
        gated = Mul(gelu, up)""",
        x="gated",
    ),
}

_NORMS = {NORMED_ROWWISE_MATMUL: (2,), POST_NORMED_ROWWISE_MATMUL: (2, 3)}
# All forms of products, by prefix and suffix: with bias or without, weights of 8 or fewer bits, rows of 8 or 16 bits.
_FORMS = tuple(
    (biased, weights, name, bits)
    for biased, weights, name, bits in itertools.product(("", BIASED), ("", *NARROW.values()), _FRONTS, ("", WIDE))
    if not (weights and name == ROWWISE_MATMUL_TRANSPOSED)  # narrow weights have one layout for both
)
PRODUCTS = frozenset("".join(form) for form in _FORMS)
# Inputs that are weights of norms.
NORM_INPUTS = frozenset(
    [("".join(form), index) for form in _FORMS for index in _NORMS.get(form[2], ())]
    + [(name, index) for name in NORMED.values() for index in (1, 2)]
)


def _product(biased: str, weights: str, name: str, bits: str) -> str:
    front = _FRONTS[name]
    body = (_WIDE_PRODUCT if bits else _PRODUCT) + front.scaled
    signature = front.signature
    if weights:
        signature = _with_attribute(signature.replace("weight, scales)", "groups, factors, scales)"), "depth")
        body = f"{matrix_of_nibbles(int(weights[-1]) - 4)} {body}"
    if biased:
        signature = signature.replace("scales)", "scales, bias)")
        body = body.replace("y = Mul(", "scaled = Mul(") + " y = Add(scaled, bias)"
    multiplied = body % {"x": front.x, "weight": front.weight}
    return f"{biased}{weights}{name}{bits} {signature} {{ {front.statements} {multiplied} }}"


def _with_attribute(signature: str, name: str) -> str:
    return signature.replace("<", f"<{name}, ", 1) if "<" in signature else f"<{name}> {signature}"


_TEXTS = {
    **{"".join(form): _product(*form) for form in _FORMS},
    **EMBEDDING_TEXTS,
    **ATTENTION_TEXTS,
}


def define(model: ir.Model, name: str) -> None:
    """Add a function to a model, unless it is there, with the model's version of ONNX's operators."""
    use_domain(model, EDGELM)
    if (EDGELM, name, "") not in model.functions:
        sets = f'"" : {model.graph.opset_imports[""]}, "{MICROSOFT}" : 1'
        text = f'<opset_import: [{sets}], domain: "{EDGELM}"> {_TEXTS[name]}'
        model.functions[EDGELM, name, ""] = ir.serde.deserialize_function(onnx.parser.parse_function(text))


def call(model: ir.Model, op: Builder, name: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
    """A call of a function with one output; options: as of `Builder`."""
    define(model, name)
    return op(name, *inputs, domain=EDGELM, **options)


def make_call(model: ir.Model, node: ir.Node, name: str) -> None:
    """Turn a node into a call of a function, keeping inputs, outputs and attributes."""
    define(model, name)
    node.domain, node.op_type = EDGELM, name
