"""The functions of the domain `edgelm`: what a graph calls where a kernel of its own may compute.

A call names what is wanted, the function's body in the file says what that is, in operators of onnxruntime alone. Where
a kernel is registered under the name, onnxruntime takes it; everywhere else it puts the body in place of the call
before anything is optimized. The texts below are the specification of the kernels.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import onnx.parser
import onnx_ir as ir

from .attention_functions import ATTENTION_TEXTS, NORMED
from .graph import MICROSOFT, Builder, use_domain

EDGELM = "edgelm"
ROWWISE_MATMUL = "RowwiseMatMul"
ROWWISE_MATMUL_TRANSPOSED = "RowwiseMatMulTransposed"
NORMED_ROWWISE_MATMUL = "NormedRowwiseMatMul"
POST_NORMED_ROWWISE_MATMUL = "PostNormedRowwiseMatMul"
GATED_ROWWISE_MATMUL = "GatedRowwiseMatMul"
GELU_GATED_ROWWISE_MATMUL = "GeluGatedRowwiseMatMul"
# Behind the name of a product whose rows are quantized to 16 bits: same inputs, outputs and attributes.
WIDE = "16"
# In front of the name of a product whose int8 matrix is written in 4 bits: two inputs, the groups of its columns and
# the factors of their blocks, in place of the matrix, and the attribute `depth`, the matrix's inputs.
INT4 = "Int4"
INT4_EMBEDDING = "Int4Embedding"
# In front of the name of a product with a bias for each column, one input more, which is added at the end.
BIASED = "Biased"
# x float32 (..., K), weight int8 (K, N), scales float32 (N), y float32 (..., N).
# The zero point is cast because onnxruntime makes one of equal constants that are int32, and not of those that are
# uint8: calls that share their x would quantize it once each.
# A row of zeros divides by zero. Whatever uint8 its NaN become, the product is finite, and times 0 it is 0: a guard
# would be one more operator for each matrix, 3 % of a decode step of the reference model.
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
# The same with 16 bits, as two planes of 8: what the first one leaves over is quantized again, to steps that are 256
# times finer. Both are rows of one integer product, which reads the matrix once.
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
# The integers cannot tell that a value of the row was NaN or infinite, and ReduceMax leaves NaN out: the sum of the row
# times 0, which is NaN then and else 0, is added to what the product is multiplied by.
_GUARDED = """
    zero = Constant<value_float = 0.0>()
    zeros = Mul(%(x)s, zero)
    nothing = ReduceSum<keepdims = 1>(zeros, axis)
    factor = Add(largest, nothing)
    y = Mul(product, factor)
"""
# groups uint8 (ceil(N / 16), 4 * blocks, 64), factors uint8 (ceil(N / 16), blocks, 16), where a block is 32 inputs of a
# column: byte 4 c + i of line j of a group are the inputs 8 j + i, in its lower half, and 8 j + 4 + i of column c; a
# weight is (its 4 bits - z) * s, with s + 16 z the column's factor. All of it is constant, and computed once, at load.
_HALVES = f"""
    low_bits = Constant<value_int = 15>()
    shift = Constant<value_int = 4>()
    fifteen = Cast<to = {ir.DataType.UINT8.value}>(low_bits)
    four = Cast<to = {ir.DataType.UINT8.value}>(shift)
"""
_MATRIX_OF_NIBBLES = f"""
    {_HALVES}
    lower = BitwiseAnd(groups, fifteen)
    upper = BitShift<direction = "RIGHT">(groups, four)
    quads = Constant<value_ints = [0, 0, 16, 4]>()
    low_quads = Reshape(lower, quads)
    high_quads = Reshape(upper, quads)
    lines = Concat<axis = 3>(low_quads, high_quads)
    by_column = Transpose<perm = [0, 2, 1, 3]>(lines)
    by_block = Constant<value_ints = [0, 16, -1, 32]>()
    levels = Reshape(by_column, by_block)
    block_steps = BitwiseAnd(factors, fifteen)
    block_zeros = BitShift<direction = "RIGHT">(factors, four)
    last = Constant<value_ints = [3]>()
    steps_by_column = Transpose<perm = [0, 2, 1]>(block_steps)
    zeros_by_column = Transpose<perm = [0, 2, 1]>(block_zeros)
    step_of_each = Unsqueeze(steps_by_column, last)
    zero_of_each = Unsqueeze(zeros_by_column, last)
    signed_levels = Cast<to = {ir.DataType.INT8.value}>(levels)
    signed_steps = Cast<to = {ir.DataType.INT8.value}>(step_of_each)
    signed_zeros = Cast<to = {ir.DataType.INT8.value}>(zero_of_each)
    moved = Sub(signed_levels, signed_zeros)
    weights = Mul(moved, signed_steps)
    padded = Flatten<axis = 2>(weights)
    origin = Constant<value_ints = [0, 0]>()
    width = Shape(scales)
    depth = Constant<value_int: int = @depth>()
    first = Constant<value_ints = [0]>()
    depths = Unsqueeze(depth, first)
    sizes = Concat<axis = 0>(width, depths)
    rows = Slice(padded, origin, sizes)
"""
# ids int64 (batch, new), y float32 (batch, new, K): a token's inputs times its scale.
_EMBEDDING_OF_NIBBLES = f"""
    {_HALVES}
    size = Constant<value_int = 16>()
    group = Div(ids, size)
    place = Mod(ids, size)
    last = Constant<value_ints = [-1]>()
    column = Unsqueeze(place, last)
    own_groups = Gather<axis = 0>(groups, group)
    quads = Constant<value_ints = [0, 0, 0, 16, 4]>()
    lines = Reshape(own_groups, quads)
    by_column = Transpose<perm = [0, 1, 3, 2, 4]>(lines)
    both = GatherND<batch_dims = 2>(by_column, column)
    low = BitwiseAnd(both, fifteen)
    high = BitShift<direction = "RIGHT">(both, four)
    line = Concat<axis = 3>(low, high)
    by_block = Constant<value_ints = [0, 0, -1, 32]>()
    levels = Reshape(line, by_block)
    own_factors = Gather<axis = 0>(factors, group)
    factors_by_column = Transpose<perm = [0, 1, 3, 2]>(own_factors)
    factor = GatherND<batch_dims = 2>(factors_by_column, column)
    step = BitwiseAnd(factor, fifteen)
    zero = BitShift<direction = "RIGHT">(factor, four)
    step_of_each = Unsqueeze(step, last)
    zero_of_each = Unsqueeze(zero, last)
    signed_levels = Cast<to = {ir.DataType.INT8.value}>(levels)
    signed_steps = Cast<to = {ir.DataType.INT8.value}>(step_of_each)
    signed_zeros = Cast<to = {ir.DataType.INT8.value}>(zero_of_each)
    moved = Sub(signed_levels, signed_zeros)
    weights = Mul(moved, signed_steps)
    flat = Constant<value_ints = [0, 0, -1]>()
    padded = Reshape(weights, flat)
    begin = Constant<value_ints = [0]>()
    depth = Constant<value_int: int = @depth>()
    end = Unsqueeze(depth, begin)
    row = Slice(padded, begin, end, last)
    values = Cast<to = {ir.DataType.FLOAT.value}>(row)
    own_scales = Gather<axis = 0>(scales, ids)
    scale = Unsqueeze(own_scales, last)
    y = Mul(values, scale)
"""


class _Front(NamedTuple):
    """What a product's function does before it multiplies: its signature, statements, and the names of what is
    multiplied."""

    signature: str
    statements: str = ""
    x: str = "x"
    weight: str = "weight"
    # How the row's scale goes into the product. Behind a norm, a row in which one value is NaN is NaN everywhere, which
    # ReduceMax keeps, and infinity stays in the sum: a guard would be 2 % of a decode step, for nothing.
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
    # The same of x and a norm of skip, with the weights post (K): a norm behind a layer, and one in front of the next.
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
# The products of all forms, by what is around the name: biases, weights of 8 or 4 bits, rows of 8 or 16.
_FORMS = tuple(
    (biased, weights, name, bits)
    for biased, weights, name, bits in itertools.product(("", BIASED), ("", INT4), _FRONTS, ("", WIDE))
    if not (weights and name == ROWWISE_MATMUL_TRANSPOSED)  # there is one order of 4 bits for both
)
PRODUCTS = frozenset("".join(form) for form in _FORMS)
# Inputs of functions that are weights of norms.
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
        body = f"{_MATRIX_OF_NIBBLES} weight = Transpose<perm = [1, 0]>(rows) {body}"
    if biased:
        signature = signature.replace("scales)", "scales, bias)")
        body = body.replace("y = Mul(", "scaled = Mul(") + " y = Add(scaled, bias)"
    multiplied = body % {"x": front.x, "weight": front.weight}
    return f"{biased}{weights}{name}{bits} {signature} {{ {front.statements} {multiplied} }}"


def _with_attribute(signature: str, name: str) -> str:
    return signature.replace("<", f"<{name}, ", 1) if "<" in signature else f"<{name}> {signature}"


_TEXTS = {
    **{"".join(form): _product(*form) for form in _FORMS},
    INT4_EMBEDDING: f"{INT4_EMBEDDING} <depth> (ids, groups, factors, scales) => (y) {{ {_EMBEDDING_OF_NIBBLES} }}",
    **ATTENTION_TEXTS,
}


def define(model: ir.Model, name: str) -> None:
    """Put a function into a model, unless it is there, in the model's version of ONNX's operators."""
    use_domain(model, EDGELM)
    if (EDGELM, name, "") not in model.functions:
        sets = f'"" : {model.graph.opset_imports[""]}, "{MICROSOFT}" : 1'
        text = f'<opset_import: [{sets}], domain: "{EDGELM}"> {_TEXTS[name]}'
        model.functions[EDGELM, name, ""] = ir.serde.deserialize_function(onnx.parser.parse_function(text))


def call(model: ir.Model, op: Builder, name: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
    """A call of a function that has one output; options as the builder takes them."""
    define(model, name)
    return op(name, *inputs, domain=EDGELM, **options)


def make_call(model: ir.Model, node: ir.Node, name: str) -> None:
    """Make a node the call of a function, with the inputs, outputs and attributes that it has."""
    define(model, name)
    node.domain, node.op_type = EDGELM, name
