"""Attention as functions of the domain `edgelm`, with bodies of onnxruntime's own operators."""

from __future__ import annotations

import itertools

from .graph import ATTENTION, KEPT_ATTENTION, MICROSOFT

NORMED = {ATTENTION: f"Normed{ATTENTION}", KEPT_ATTENTION: f"KeptNormed{ATTENTION}"}
ATTENTION_ATTRIBUTES = (
    "num_heads",
    "kv_num_heads",
    "scale",
    "do_rotary",
    "local_window_size",
    "k_quant_type",
    "v_quant_type",
    "kv_cache_bit_width",
)

_ATTENTION_INPUTS = (
    "query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids, "
    "attention_bias, head_sink, k_scale, v_scale"
)
_ATTENTION_STATES = "present_key, present_value"
_TYPES = {"scale": "float", "k_quant_type": "string", "v_quant_type": "string"}
_ATTRIBUTES = ", ".join(ATTENTION_ATTRIBUTES)
_PASSED_ON = ", ".join(f"{name}: {_TYPES.get(name, 'int')} = @{name}" for name in ATTENTION_ATTRIBUTES)
# query (batch, new, (num_heads + 2 kv_num_heads) * size), query_norm and key_norm (size). onnxruntime folds what is
# computed from constants.
_HEAD_NORMS = """
    size = Shape(query_norm)
    query_heads = Constant<value_int: int = @num_heads>()
    key_heads = Constant<value_int: int = @kv_num_heads>()
    query_width = Mul(query_heads, size)
    key_width = Mul(key_heads, size)
    widths = Concat<axis = 0>(query_width, key_width, key_width)
    side_by_side = Constant<value_ints = [0, 0, -1]>()
    by_head = Concat<axis = 0>(side_by_side, size)
    plain_queries, plain_keys, values = Split<axis = 2>(query, widths)
    queries_by_head = Reshape(plain_queries, by_head)
    keys_by_head = Reshape(plain_keys, by_head)
    normed_queries = SimplifiedLayerNormalization
        <axis = -1, epsilon: float = @epsilon, stash_type = 1> (queries_by_head, query_norm)
    normed_keys = SimplifiedLayerNormalization
        <axis = -1, epsilon: float = @epsilon, stash_type = 1> (keys_by_head, key_norm)
    queries = Reshape(normed_queries, side_by_side)
    keys = Reshape(normed_keys, side_by_side)
"""
_KEPT_ROWS = f"""
    end = Constant<value_ints = [{2**63 - 1}]>()
    axis = Constant<value_ints = [1]>()
    kept = Slice(output, start, end, axis)
"""


def _attention_name(kept: bool, normed: bool) -> str:
    return f"{'Kept' if kept else ''}{'Normed' if normed else ''}{ATTENTION}"


def _attention(kept: bool, normed: bool) -> str:
    """com.microsoft's attention operator as a function, for an INT8 cache with a scale per channel, or between INT8
    activations. Attributes that few models need (a soft cap, a sink) are left out, so that kernels need not support
    them: nodes with them stay com.microsoft's.

    kept: only the rows from `start` on (int64 (1), counted from the end if negative); normed: queries, keys and values
    come side by side, and each head of queries and keys is normed first.
    """
    inputs, attributes, attended = _ATTENTION_INPUTS, _ATTRIBUTES, _ATTENTION_INPUTS
    if normed:
        attended = inputs.replace("query, key, value", "queries, keys, values", 1)
        inputs, attributes = inputs.replace("key, value", "query_norm, key_norm", 1), f"{attributes}, epsilon"
    given = f"{inputs}, start" if kept else inputs
    return f"""{_attention_name(kept, normed)} <{attributes}> ({given}) => (
            {"kept" if kept else "output"}, {_ATTENTION_STATES}) {{
        {_HEAD_NORMS if normed else ""}
        output, {_ATTENTION_STATES} = {MICROSOFT}.{ATTENTION} <{_PASSED_ON}> ({attended})
        {_KEPT_ROWS if kept else ""} }}"""


# The text of each function by name.
ATTENTION_TEXTS = {_attention_name(*kind): _attention(*kind) for kind in itertools.product((False, True), repeat=2)}
