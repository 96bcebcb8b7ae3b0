"""The schemes and types that exist, and what onnxruntime's execution providers can compute of them.

Read in onnxruntime's tables of kernels (docs/OperatorKernels.md): `GroupQueryAttention` exists in float16 and bfloat16
only on CUDA, `MatMulIntegerToFloat` not at all there; on CPUs it exists in float32 and float16.
"""

from __future__ import annotations

CUDA = "CUDAExecutionProvider"

_SCHEMES = {
    "float32": ("int8-rowwise", "int4-rowwise", "int8-tensor", "int8-weight", "int4-weight", "fp32"),
    "float16": ("int8-weight", "int4-weight", "fp16"),
}
_KV_TYPES = {"float32": ("int8", "float32"), "float16": ("float16",)}
SCHEMES = tuple(dict.fromkeys(scheme for schemes in _SCHEMES.values() for scheme in schemes))
KV_TYPES = tuple(dict.fromkeys(kind for kinds in _KV_TYPES.values() for kind in kinds))
ACTIVATIONS = tuple(_SCHEMES)
# The scheme whose matrices have 4, 5, 6 or 8 bits each.
MIXED_SCHEME = "int4-rowwise"
# Schemes with one scale for all rows of an activation, or with weights of 4 bits. They are known to cost quality, so
# they have wider limits. Those of MIXED_SCHEME follow from its bits.
COARSE_SCHEMES = ("int8-tensor", "int4-weight")


def schemes_with(activations: str) -> tuple[str, ...]:
    """The quantization schemes that a graph with activations of this type can have."""
    return _SCHEMES[activations]


def kv_types_with(activations: str) -> tuple[str, ...]:
    """The types of the KV cache that a graph with activations of this type can have."""
    return _KV_TYPES[activations]


def lacks(provider: str, activations: str) -> str | None:
    """Why a provider cannot run graphs with activations of this type; None if it can."""
    if provider == CUDA and activations != "float16":
        return f"{CUDA} has no {activations} kernel of GroupQueryAttention: set activations to float16"
    return None
