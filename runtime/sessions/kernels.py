"""Compiled kernels for the functions that an INT8 graph calls, where the package edgelm-kernels is installed.

A function of the domain `edgelm` has a body of onnxruntime's own operators. If a library of kernels is registered,
onnxruntime runs those in place of the bodies; without it, the bodies. Row-wise products have the same bits either way;
attention, and norms and gates in front of products, have not, so that what is cached names the kernels
(`identity`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.onnx_file import operators
from ..errors import SessionError
from .providers import CPU

# Set to "off", it leaves the kernels out: to compare, or to see whether a fault is theirs.
SWITCH = "EDGELM_KERNELS"
_PACKAGE = "edgelm_kernels"
# That of the package. With others, functions that they lack would run as their bodies, slower, and where a single row
# relies on a kernel, with other bits.
_INTERFACE = 8
_DOMAIN, _MICROSOFT = "edgelm", "com.microsoft"
# How the library learns with how many threads to compute, onnxruntime does not tell operators, and whether its own.
_THREADS_KEY, _OWN_THREADS_KEY = "edgelm.threads", "edgelm.own_threads"
# Operators of onnxruntime in front of a model's layers and behind them: mask, embedding, the last norm. Where there are
# more, they are in the layers, and take onnxruntime's threads for long prompts.
_AROUND_LAYERS = 24

# Whether what is loaded now is to have kernels; asked while a model is loaded, and never afterwards.
_wanted = ContextVar("wanted", default=True)


@contextlib.contextmanager
def wanted(are_wanted: bool) -> Iterator[None]:
    """What this thread loads in the block computes without kernels if they are not wanted."""
    token = _wanted.set(are_wanted and _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def are_installed() -> bool:
    """Whether the package is there, whether or not its kernels are used."""
    return importlib.util.find_spec(_PACKAGE) is not None


@functools.cache
def _arithmetic() -> str | None:
    if not are_installed():
        return None
    import edgelm_kernels

    if getattr(edgelm_kernels, "INTERFACE", None) != _INTERFACE:
        raise SessionError(
            "edgelm-kernels belongs to another version of edgelm: install both from one copy  (pip install ./kernels), "
            f"or leave it out with  {SWITCH}=off"
        )
    try:
        found: str | None = edgelm_kernels.arithmetic()
    except OSError as error:
        raise SessionError(
            f"edgelm-kernels is installed and cannot be loaded ({error}): install it again, for this system, or leave "
            f"it out with  {SWITCH}=off"
        ) from error
    return found


@functools.cache
def _library_digest() -> str:
    """More exact than the package's version, and without `importlib.metadata`, which takes 2 to 4 MB."""
    import edgelm_kernels

    return hashlib.sha256(edgelm_kernels.library().read_bytes()).hexdigest()[:12]


def identity() -> str | None:
    """Which kernels, by a digest of their library, and with which instruction sets: what decides the last bits of
    logits; None if none are used.

    They are left out where the package is not installed, has no code for this processor, is switched off, or is not
    `wanted`.
    Raises: SessionError, if they cannot be loaded, or belong to another version of edgelm.
    """
    if not _wanted.get() or os.environ.get(SWITCH, "").lower() == "off" or _arithmetic() is None:
        return None
    return f"edgelm-kernels {_library_digest()} {_arithmetic()}"


@dataclass(frozen=True)
class Use:
    """What kernels compute of a graph. serve: anything at all; attend: all of its attention; compute_layers: all of its
    layers, nearly."""

    serve: bool = False
    attend: bool = False
    compute_layers: bool = False


UNUSED = Use()


def use_in(graph: Path, provider: str = CPU) -> Use:
    """What kernels compute of a graph on a provider of onnxruntime, by the operators that the graph calls.

    Kernels run on the CPU only. Cost: one read of the file's structure, so ask once a load. Raises: as `identity` and
    `operators`.
    """
    if provider != CPU or identity() is None:
        return UNUSED
    calls = operators(graph)
    own = sum(count for (domain, _), count in calls.items() if domain == _DOMAIN)
    attention_is_theirs = (_MICROSOFT, "GroupQueryAttention") not in calls
    few_others = calls.total() - own <= _AROUND_LAYERS
    return Use(own > 0, own > 0 and attention_is_theirs, own > 0 and few_others)


def register(options: Any, threads: int, own_threads: bool) -> None:
    """Add the kernels to the options of a session that computes with so many threads.

    own_threads: kernels bring them, and read ahead between two operators, while onnxruntime has none beside the
    caller's; else they share onnxruntime's. Threads of both would wait awake for each other's processors.
    """
    import edgelm_kernels

    options.intra_op_num_threads = 1 if own_threads else threads
    options.add_session_config_entry(_THREADS_KEY, str(threads))
    options.add_session_config_entry(_OWN_THREADS_KEY, str(int(own_threads)))
    options.register_custom_ops_library(str(edgelm_kernels.library()))
