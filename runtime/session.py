"""A session runs the graph of a bundle over one growing sequence: token ids in, logits out, the KV cache in place.

`Session` is the protocol; `OrtSession` computes with onnxruntime on bound buffers, so that a step copies nothing but
token ids and logits. The numpy stand-in behind the same protocol is `edgelm.runtime.fake.FakeSession`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import machine
from .bundle import GRAPH_NAME, Bundle
from .errors import SessionError, SettingsError
from .kv import KVCache
from .manifest import Model
from .ort import load_onnxruntime, mapped_errors, onnxruntime_errors

_REPAIR = "export the model again, and check that onnxruntime is as new as the one that exported it"
# One row alone takes another float kernel inside onnxruntime's attention than several rows do, and differs in the last
# bits. With a float32 cache a step therefore always has two rows; with an int8 cache both kernels give the same bits.
_FLOAT_CACHE_ROWS = 2


class Session(Protocol):
    """One sequence in a model. Not safe between threads: whoever owns it takes turns."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Append tokens and compute the logits of the last `keep` of them.

        Returns: (keep, vocab_size) float32, valid until the next step. 1 <= keep <= len(token_ids), and length +
        len(token_ids) must not pass the context length; both are the caller's to hold. Raises: SessionError.
        """

    def can_rewind(self, length: int) -> bool:
        """Whether `rewind` can go back to this length. To 0 it always can; a recurrence knows no way back to others."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on; 0 <= length <= self.length, and `can_rewind(length)`."""

    def close(self) -> None:
        """Free the graph and the cache. Calling it again does nothing."""


class OrtSession:
    """`Session` over onnxruntime. Loading maps the weights and prepares them for this CPU (some 0.2 s for 135 MB)."""

    def __init__(
        self, graph: Path, model: Model, threads: int, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        """graph: path of the ONNX file, whose weights lie beside it. Raises: SessionError."""
        self._model = model
        self._inference = load_graph(graph, threads, providers)
        self.cache = KVCache(model)
        self._binding = self._inference.io_binding()
        self._unbound = False
        self._ids = np.zeros((1, 0), np.int64)
        self._mask = np.ones((1, 0), np.int64)
        self._keep = np.zeros(1, np.int64)
        self._logits = np.zeros((1, 0, model.vocab_size), np.float32)
        self._bind_input("logits_to_keep", self._keep)
        self._errors = onnxruntime_errors()
        self._min_rows = _FLOAT_CACHE_ROWS if model.kv.type == "float32" else 1

    @property
    def length(self) -> int:
        return self.cache.length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        padding = max(0, self._min_rows - len(token_ids))
        rows = len(token_ids) + padding
        try:
            self._prepare(rows, keep + padding)
            self._ids[0, : len(token_ids)] = token_ids
            self._ids[0, len(token_ids) :] = token_ids[-1]
            self._inference.run_with_iobinding(self._binding)
        except self._errors as error:
            reason = " ".join(str(error).split())
            raise SessionError(
                f"a step of {rows} tokens at position {self.length} failed: {reason}; {_REPAIR}"
            ) from error
        self.cache.length += len(token_ids)
        return self._logits[0, :keep]

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self.length

    def rewind(self, length: int) -> None:
        self.cache.truncate(length)

    def read(self, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        """Copy the keys and values of positions begin to end - 1, as `KVCache.read`."""
        self.cache.read(begin, end, block)

    def append(self, block: NDArray[np.uint8], positions: int) -> None:
        """Put what `read` gave for so many positions behind the last one, as if their tokens had been run."""
        self._unbound |= self.cache.reserve(self.length + positions)
        self.cache.append(block, positions)

    def block_bytes(self, positions: int) -> int:
        """The size of a block of so many positions."""
        return self.cache.bytes_per_position() * positions

    def close(self) -> None:
        self._binding = self._inference = None
        self.cache = KVCache(self._model)

    def _prepare(self, rows: int, keep: int) -> None:
        """Bind what changed since the last step: most steps only the mask's length."""
        self._unbound |= self.cache.reserve(self.length + rows)
        if self._unbound:
            self._mask = np.ones((1, self.cache.capacity), np.int64)
            for name, buffer in self.cache.buffers():
                self._bind_input(f"past_key_values.{name}", buffer)
                self._bind_output(f"present.{name}", buffer)
            self._unbound = False
        if rows != self._ids.shape[1]:
            self._ids = np.zeros((1, rows), np.int64)
            self._bind_input("input_ids", self._ids)
        if keep != self._logits.shape[1]:
            self._logits = np.zeros((1, keep, self._model.vocab_size), np.float32)
            self._bind_output("logits", self._logits)
        self._keep[0] = keep
        self._bind_input("attention_mask", self._mask[:, : self.length + rows])

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        # The address of a numpy array: the binding keeps no reference, the arrays are attributes of this object.
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def make_session(
    graph: Path, model: Model, threads: int, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> Session:
    """The session that fits the graph's way of caching. Raises: SessionError."""
    if model.cache_layout == "in_place":
        return OrtSession(graph, model, threads, providers)
    from .concat_session import ConcatSession

    return ConcatSession(load_graph(graph, threads, providers), model)


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """Check every file of a bundle against its digest and load the model. threads: None for the physical cores.

    The weights' digest is computed in a thread while onnxruntime prepares them; the small files, which onnxruntime and
    tokenizers parse, are checked before. Raises: SettingsError, BundleCorruptError, SessionError.
    """
    count = _thread_count(threads)
    weights = {name for name in bundle.manifest.files if name.endswith(".data")}
    with ThreadPoolExecutor(1) as pool:
        weights_checked = pool.submit(bundle.check_files, weights)
        bundle.check_files(bundle.manifest.files.keys() - weights)
        session = make_session(bundle.path / GRAPH_NAME, bundle.manifest.model, count)
        weights_checked.result()
    return session


def open_folder(path: str | Path, threads: int | None = None, graph: str | None = None) -> tuple[Bundle, Session]:
    """Load the model of a folder, be it a bundle or what another exporter wrote (see `edgelm.runtime.foreign`).

    graph: for the latter, which of several ONNX files, relative to the folder.
    Raises: BundleError and below for the folder, SettingsError, SessionError.
    """
    from . import foreign

    folder = Path(path)
    if foreign.is_foreign(folder):
        return foreign.open_foreign(folder, graph, _thread_count(threads))
    bundle = Bundle.open(folder)
    if graph is not None:
        raise SettingsError(f"{folder} is a bundle, which has one graph: leave out  graph={graph}")
    return bundle, open_session(bundle, threads)


def _thread_count(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise SettingsError(f"threads must be 1 or more, found {threads}")
    return threads or machine.default_threads()


def load_graph(graph: Path, threads: int, providers: Sequence[str]) -> Any:
    """onnxruntime's session over a graph, with edgelm's settings. Raises: SessionError."""
    onnxruntime = load_onnxruntime()
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise SessionError(f"onnxruntime has no {missing[0]} here: install the onnxruntime package that has it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The arena keeps what the longest prompt needed for good. Without it memory falls back; speed is the same here.
    options.enable_cpu_mem_arena = False
    if machine.saturates_int8():
        # Weights become uint8 at load: slower, but sums do not overflow 16 bits on CPUs without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
    with mapped_errors(f"could not load {graph}", _REPAIR):
        return onnxruntime.InferenceSession(graph, options, providers=list(providers))
