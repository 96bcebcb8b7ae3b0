"""Estimate whether a bundle fits into this machine's memory and how fast it generates, before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.folder import GRAPH_NAME, Bundle
from ..bundle.onnx_file import streamed_bytes
from .diagnosis import Diagnosis

# Largest resident memory as a multiple of the weights, without the KV cache. Without kernels, onnxruntime copies the
# weights while it loads. Kernels compute with the weights as they are in the file.
_BYTES_A_PARAMETER, _BYTES_WITH_KERNELS = 2.6, 1.3
# The share of the memory's speed that decoding reached on two x86 cores (docs/benchmarks.md).
_SHARE, _SHARE_WITH_KERNELS = 0.48, 0.72
# The speed at which most people read.
COMFORTABLE_TOKENS_PER_S = 10


@dataclass(frozen=True)
class Expectation:
    """bytes_a_token: bytes of weights that each token reads; most_tokens_per_s: the limit that the memory's speed sets
    on a short context; usual_tokens_per_s: the share of that limit which another machine reached; fits: whether the
    free memory is enough."""

    bundle: str
    bytes_a_token: int
    most_tokens_per_s: float
    usual_tokens_per_s: float
    fits: bool


def largest_parameters(found: Diagnosis) -> float:
    """How many parameters of an INT8 model the free memory holds."""
    return found.available_bytes / (_BYTES_WITH_KERNELS if found.kernels else _BYTES_A_PARAMETER)


def comfortable_parameters(found: Diagnosis, memory_bytes_per_s: float) -> float:
    """The largest INT8 model, in parameters of one byte, that this memory reads `COMFORTABLE_TOKENS_PER_S` times a
    second."""
    return _share(found) * memory_bytes_per_s / COMFORTABLE_TOKENS_PER_S


def expect(folder: str, found: Diagnosis, memory_bytes_per_s: float) -> Expectation:
    """The estimate for one bundle. Cost: the graph's structure is read. Raises: as `Bundle.open`."""
    bundle = Bundle.open(folder)
    size = max(1, streamed_bytes(bundle.path / GRAPH_NAME))
    most = memory_bytes_per_s / size
    fits = bundle.manifest.model.parameters <= largest_parameters(found)
    return Expectation(folder, size, most, _share(found) * most, fits)


def _share(found: Diagnosis) -> float:
    return _SHARE_WITH_KERNELS if found.kernels else _SHARE
