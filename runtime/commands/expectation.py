"""What to expect of a bundle on this machine, before it is loaded: whether it fits, and how fast it writes."""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.folder import GRAPH_NAME, Bundle
from ..bundle.onnx_file import streamed_bytes
from .diagnosis import Diagnosis

# What was resident at most, the KV cache not counted: weights, and without kernels the copies that onnxruntime makes of
# them while it loads. Kernels compute with the weights as they are in the file.
_BYTES_A_PARAMETER, _BYTES_WITH_KERNELS = 2.6, 1.3
# The share of the memory's speed with which weights were read on two x86 cores (docs/benchmarks.md).
_SHARE, _SHARE_WITH_KERNELS = 0.48, 0.72
# As fast as most people read.
COMFORTABLE_TOKENS_PER_S = 10


@dataclass(frozen=True)
class Expectation:
    """bytes_a_token: of weights that a token reads; most_tokens_per_s: what the memory's speed allows on a short
    context; usual_tokens_per_s: with the share of it that was measured on another machine; fits: whether the free
    memory is enough."""

    bundle: str
    bytes_a_token: int
    most_tokens_per_s: float
    usual_tokens_per_s: float
    fits: bool


def largest_parameters(found: Diagnosis) -> float:
    """How many parameters of an INT8 model the free memory holds."""
    return found.available_bytes / (_BYTES_WITH_KERNELS if found.kernels else _BYTES_A_PARAMETER)


def comfortable_parameters(found: Diagnosis, memory_bytes_per_s: float) -> float:
    """How many parameters of an INT8 model are read `COMFORTABLE_TOKENS_PER_S` times a second, a byte each."""
    return _share(found) * memory_bytes_per_s / COMFORTABLE_TOKENS_PER_S


def expect(folder: str, found: Diagnosis, memory_bytes_per_s: float) -> Expectation:
    """What to expect of a bundle. Cost: its structure is read. Raises: as `Bundle.open`."""
    bundle = Bundle.open(folder)
    size = max(1, streamed_bytes(bundle.path / GRAPH_NAME))
    most = memory_bytes_per_s / size
    fits = bundle.manifest.model.parameters <= largest_parameters(found)
    return Expectation(folder, size, most, _share(found) * most, fits)


def _share(found: Diagnosis) -> float:
    return _SHARE_WITH_KERNELS if found.kernels else _SHARE
