"""Load a graph into onnxruntime, with edgelm's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle.folder import GRAPH_NAME, WEIGHTS_NAME
from ..errors import SessionError
from ..host import machine
from ..host.memory import require_bytes
from ..host.ort import load_onnxruntime, mapped_errors
from . import kernels
from .providers import CUDA, require_used

REPAIR = "export the model again, and check that onnxruntime is as new as the one that exported it"
_PREPARING = {
    "optimized_model_external_initializers_file_name": WEIGHTS_NAME,
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
    "save_external_prepacked_constant_initializers": "1",
}


def require_memory(weights_bytes: int, folder: Path) -> None:
    """Raise MemoryShortageError if there is no memory for a model with so many bytes of weights: onnxruntime copies
    each matrix into the order of its kernel. (A prepared form is only mapped.)"""
    require_bytes(weights_bytes, f"the model of {folder}", "close other programs, or export a smaller model")


def load_graph(
    graph: Path,
    threads: int,
    providers: Sequence[str],
    preparing: Path | None = None,
    *,
    use: kernels.Use = kernels.UNUSED,
    captures: bool = False,
) -> Any:
    """onnxruntime's session over a graph, with edgelm's settings.

    preparing: a folder to write the prepared form to, graph and weights; use: what kernels compute; captures: on CUDA,
    capture runs as CUDA graphs. Raises: SessionError, also if the graph cannot be captured.
    """
    onnxruntime = load_onnxruntime()
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise SessionError(f"onnxruntime has no {missing[0]} here: install the onnxruntime package that has it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Errors are raised. onnxruntime would also print them on standard error, in colours.
    options.log_severity_level = 4
    # The arena would never return the memory that the longest prompt needed. Speed is the same without it.
    options.enable_cpu_mem_arena = False
    if machine.saturates_int8():
        # Weights become uint8 at load: slower, but sums do not overflow 16 bits on CPUs without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if preparing is not None:
        options.optimized_model_filepath = str(preparing / GRAPH_NAME)
        for name, value in _PREPARING.items():
            options.add_session_config_entry(f"session.{name}", value)
    with mapped_errors(f"could not load {graph}", REPAIR):
        if use.serve:
            kernels.register(options, threads, use.compute_layers)
        settings = [{"enable_cuda_graph": "1"} if captures and name == CUDA else {} for name in providers]
        session = onnxruntime.InferenceSession(graph, options, providers=list(zip(providers, settings, strict=True)))
    require_used(providers[0], session.get_providers())
    return session
