"""Bodies of functions that read an int8 matrix stored with 4, 5 or 6 bits a weight."""

from __future__ import annotations

import onnx_ir as ir

# Prefixes of a product whose int8 matrix is stored with fewer bits. Two inputs replace the matrix: groups of its
# columns, and factors of their blocks. The attribute `depth` is the number of the matrix's inputs.
NARROW = {4: "Int4", 5: "Int5", 6: "Int6"}
EMBEDDING = "Embedding"  # suffix: rows of such a matrix by token ids
# groups uint8 (ceil(N / 16), (4 + p) * blocks, 64), factors uint8 (ceil(N / 16), blocks, 16), for weights of 4 + p
# bits, where a block is 32 inputs of a column and has 4 lines of nibbles and p lines of one bit more each. Byte 4 c + i
# of line j of nibbles: the inputs 8 j + i of column c, in its lower half, and 8 j + 4 + i; bit b of byte 4 c + i of a
# plane: the input 4 b + i. A weight is (its bits - z) * s, with s + z * 2^(4 - p) the column's factor.
_UINT8, _INT8 = ir.DataType.UINT8.value, ir.DataType.INT8.value


def _number(name: str, value: int) -> str:
    return f"{name}_wide = Constant<value_int = {value}>() {name} = Cast<to = {_UINT8}>({name}_wide)"


def _plane(index: int) -> str:
    """Adds the bit of a plane to `bits{index}`, (groups, lines, 16, 8), as `bits{index + 1}`."""
    return f"""
    begin{index} = Constant<value_ints = [{4 + index}]>()
    end{index} = Constant<value_ints = [{5 + index}]>()
    plane{index} = Slice(by_line, begin{index}, end{index}, line_axis)
    {_number(f"place{index}", 4 + index)}
    shifted{index} = BitShift<direction = "RIGHT">(plane{index}, each_bit)
    bit{index} = BitwiseAnd(shifted{index}, one)
    raised{index} = BitShift<direction = "LEFT">(bit{index}, place{index})
    quads{index} = Reshape(raised{index}, of_halves)
    turned{index} = Transpose<perm = [0, 1, 3, 2, 4]>(quads{index})
    added{index} = Reshape(turned{index}, of_columns)
    bits{index + 1} = BitwiseOr(bits{index}, added{index})
    """


def _int8_by_column(planes: int) -> str:
    """From `own_groups` and `own_factors` to `weights` int8 (groups, 16, blocks, 32)."""
    return f"""
    {_number("fifteen", 15)} {_number("four", 4)} {_number("one", 1)}
    {_number("step_bits", 4 - planes)} {_number("step_mask", (1 << (4 - planes)) - 1)}
    bit_list = Constant<value_ints = [0, 1, 2, 3, 4, 5, 6, 7]>()
    bit_shape = Constant<value_ints = [8, 1]>()
    bit_column = Reshape(bit_list, bit_shape)
    each_bit = Cast<to = {_UINT8}>(bit_column)
    line_axis = Constant<value_ints = [2]>()
    of_lines = Constant<value_ints = [0, -1, {4 + planes}, 64]>()
    of_quads = Constant<value_ints = [0, -1, 16, 4]>()
    of_halves = Constant<value_ints = [0, -1, 2, 16, 4]>()
    of_columns = Constant<value_ints = [0, -1, 16, 8]>()
    of_blocks = Constant<value_ints = [0, 16, -1, 32]>()
    no_line = Constant<value_ints = [0]>()
    four_lines = Constant<value_ints = [4]>()
    by_line = Reshape(own_groups, of_lines)
    nibbles = Slice(by_line, no_line, four_lines, line_axis)
    lower = BitwiseAnd(nibbles, fifteen)
    upper = BitShift<direction = "RIGHT">(nibbles, four)
    lower_quads = Reshape(lower, of_quads)
    upper_quads = Reshape(upper, of_quads)
    bits0 = Concat<axis = 3>(lower_quads, upper_quads)
    {"".join(_plane(index) for index in range(planes))}
    by_column = Transpose<perm = [0, 2, 1, 3]>(bits{planes})
    levels = Reshape(by_column, of_blocks)
    block_steps = BitwiseAnd(own_factors, step_mask)
    block_zeros = BitShift<direction = "RIGHT">(own_factors, step_bits)
    last_axis = Constant<value_ints = [3]>()
    steps_by_column = Transpose<perm = [0, 2, 1]>(block_steps)
    zeros_by_column = Transpose<perm = [0, 2, 1]>(block_zeros)
    step_of_each = Unsqueeze(steps_by_column, last_axis)
    zero_of_each = Unsqueeze(zeros_by_column, last_axis)
    signed_levels = Cast<to = {_INT8}>(levels)
    signed_steps = Cast<to = {_INT8}>(step_of_each)
    signed_zeros = Cast<to = {_INT8}>(zero_of_each)
    moved = Sub(signed_levels, signed_zeros)
    weights = Mul(moved, signed_steps)
    depth = Constant<value_int: int = @depth>()
    first_axis = Constant<value_ints = [0]>()
    depths = Unsqueeze(depth, first_axis)
    """


def matrix_of_nibbles(planes: int) -> str:
    """Computes `weight` int8 (K, N). It is constant, so onnxruntime computes it once, at load."""
    return f"""
    own_groups = Identity(groups)
    own_factors = Identity(factors)
    {_int8_by_column(planes)}
    padded = Flatten<axis = 2>(weights)
    origin = Constant<value_ints = [0, 0]>()
    width = Shape(scales)
    sizes = Concat<axis = 0>(width, depths)
    rows = Slice(padded, origin, sizes)
    weight = Transpose<perm = [1, 0]>(rows)
    """


def _embedding_of_nibbles(planes: int) -> str:
    """ids int64 (batch, new), y float32 (batch, new, K): a token's inputs times its scale."""
    return f"""
    size = Constant<value_int = 16>()
    all_tokens = Constant<value_ints = [-1]>()
    each_id = Reshape(ids, all_tokens)
    group = Div(each_id, size)
    place = Mod(each_id, size)
    own_groups = Gather<axis = 0>(groups, group)
    own_factors = Gather<axis = 0>(factors, group)
    {_int8_by_column(planes)}
    column = Unsqueeze(place, all_tokens)
    own = GatherND<batch_dims = 1>(weights, column)
    padded = Flatten<axis = 1>(own)
    second_axis = Constant<value_ints = [1]>()
    row = Slice(padded, first_axis, depths, second_axis)
    values = Cast<to = {ir.DataType.FLOAT.value}>(row)
    own_scales = Gather<axis = 0>(scales, each_id)
    scale = Unsqueeze(own_scales, all_tokens)
    scaled = Mul(values, scale)
    id_shape = Shape(ids)
    shape = Concat<axis = 0>(id_shape, depths)
    y = Reshape(scaled, shape)
    """


EMBEDDING_TEXTS = {
    name + EMBEDDING: f"{name}{EMBEDDING} <depth> (ids, groups, factors, scales) => (y) {{ "
    f"{_embedding_of_nibbles(bits - 4)} }}"
    for bits, name in NARROW.items()
}
