"""Compiled kernels for the functions that an INT8 graph calls, if the package edgelm-kernels is installed.

A function of the domain `edgelm` has a body of onnxruntime's own operators. If a library of kernels is registered,
onnxruntime runs a kernel instead of the body. Row-wise products have the same bits either way. Attention, and norms and
gates in front of products, do not, so cache keys include the kernels (`identity`).
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

# "off" switches the kernels off: to compare, or to find out whether a fault is theirs.
SWITCH = "EDGELM_KERNELS"
# Names the instruction set that the library computes with, to test on one processor what another computes.
_CHOICE = "EDGELM_KERNELS_ARITHMETIC"
_PACKAGE = "edgelm_kernels"
# The interface number that the package must have. With another one, functions without a kernel would run as their
# bodies: more slowly, and sometimes with other bits.
_INTERFACE = 8
_DOMAIN, _MICROSOFT = "edgelm", "com.microsoft"
# Session options for the library: how many threads to use (onnxruntime does not tell operators), and whether to start
# its own.
_THREADS_KEY, _OWN_THREADS_KEY = "edgelm.threads", "edgelm.own_threads"
# Operators of onnxruntime outside a model's layers: mask, embedding, last norm. If there are more, some are inside the
# layers, and need onnxruntime's threads for long prompts.
_AROUND_LAYERS = 24

# Whether models that are loaded now use kernels. Read only while a model is loaded.
_wanted = ContextVar("wanted", default=True)


@contextlib.contextmanager
def wanted(are_wanted: bool) -> Iterator[None]:
    """Models that this thread loads in the block use no kernels if `are_wanted` is False."""
    token = _wanted.set(are_wanted and _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def are_installed() -> bool:
    """Whether the package is installed, even if its kernels are not used."""
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
    chosen = os.environ.get(_CHOICE)
    if found is None and chosen is not None:
        raise SessionError(f"{_CHOICE}={chosen!r} names no instruction set that the kernels can use here: unset it")
    return found


@functools.cache
def _library_digest() -> str:
    """A digest, not the package's version: it is more exact, and `importlib.metadata` takes 2 to 4 MB."""
    import edgelm_kernels

    return hashlib.sha256(edgelm_kernels.library().read_bytes()).hexdigest()[:12]


def identity() -> str | None:
    """The kernels' digest and instruction sets, which decide the last bits of logits. None if no kernels are used: the
    package is not installed, has no code for this processor, is switched off, or is not `wanted`.

    Raises: SessionError, if they cannot be loaded, belong to another version of edgelm, or were told to use an
    instruction set that this processor lacks.
    """
    if not _wanted.get() or os.environ.get(SWITCH, "").lower() == "off" or _arithmetic() is None:
        return None
    return f"edgelm-kernels {_library_digest()} {_arithmetic()}"


@dataclass(frozen=True)
class Use:
    """What kernels compute of a graph. serve: something; attend: all attention; compute_layers: nearly all of the
    layers."""

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
    """Add the kernels to the options of a session. threads: how many to compute with.

    own_threads: kernels start their own threads, which also read ahead between two operators, and onnxruntime gets
    none. Otherwise kernels use onnxruntime's threads. With both, waiting threads would spin on processors that the
    others need.
    """
    import edgelm_kernels

    options.intra_op_num_threads = 1 if own_threads else threads
    options.add_session_config_entry(_THREADS_KEY, str(threads))
    options.add_session_config_entry(_OWN_THREADS_KEY, str(int(own_threads)))
    options.register_custom_ops_library(str(edgelm_kernels.library()))
