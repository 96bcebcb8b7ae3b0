"""A session runs the graph of a bundle over one growing sequence: token ids in, logits out, the KV cache in place.

`Session` is the protocol; `OrtSession` computes with onnxruntime on bound buffers, so that a step copies nothing but
token ids and logits. The numpy stand-in behind the same protocol is `edgelm.runtime.fake.FakeSession`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import kernels, machine
from .batch_session import OrtRowsSession
from .bundle import GRAPH_NAME, WEIGHTS_NAME, Bundle
from .errors import CacheCorruptError, SessionError, SettingsError
from .kv import KVCache
from .lookup import MOST_GUESSES
from .manifest import Model
from .memory import require_bytes, zeros
from .ort import load_onnxruntime, mapped_errors, onnxruntime_errors
from .prepared import Prepared, prepared_for
from .providers import CPU, CUDA, choose_provider, device_of, foreign_machine, gpu_names, require_used

_REPAIR = "export the model again, and check that onnxruntime is as new as the one that exported it"
# One row alone takes another float kernel inside onnxruntime's attention than several rows do, and differs in the last
# bits. With a float32 cache a step therefore always has two rows, unless compiled kernels compute its attention; with
# an int8 cache both of onnxruntime's kernels give the same bits.
_FLOAT_CACHE_ROWS = 2
# Prompts are fed in pieces, which bound the memory of a step. onnxruntime's attention computes what lies above the
# diagonal of a piece, too: with 384 tokens a prompt takes 7 to 11 % longer than with 256. Compiled kernels arrange
# keys, values and weights once a piece instead: with 384 it takes 4 % less, and with more no less (docs/speed.md).
PIECE_TOKENS, KERNELS_PIECE_TOKENS = 256, 384
# Rows of logits that a step may keep without a new buffer: those of a token and the guesses behind it. The system gives
# memory only to rows that are written.
_SHARED_ROWS = 1 + MOST_GUESSES
# For `logits_to_keep`, of which 0 means all: the graph takes rows from minus that on, and there are none so far on.
_NO_ROWS = -np.iinfo(np.int64).max

_PREPARING = {
    "optimized_model_external_initializers_file_name": WEIGHTS_NAME,
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
    "save_external_prepacked_constant_initializers": "1",
}
_logger = logging.getLogger(__name__)


class Session(Protocol):
    """One sequence in a model. Not safe between threads: whoever owns it takes turns."""

    @property
    def length(self) -> int:
        """Positions in the cache."""

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Append tokens and compute the logits of the last `keep` of them; 0, where a prompt goes on behind them.

        Returns: (keep, vocab_size) float32, valid until the next step. 0 <= keep <= len(token_ids), and length +
        len(token_ids) must not pass the context length; both are the caller's to hold. Raises: SessionError.
        """

    def expect(self, positions: int) -> None:
        """Tell how long the text is likely to become, so that room for it is made at once. It may become longer."""

    def can_rewind(self, length: int) -> bool:
        """Whether `rewind` can go back to this length. To 0 it always can; a recurrence knows no way back to others."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on; 0 <= length <= self.length, and `can_rewind(length)`."""

    def close(self) -> None:
        """Free the graph and the cache. Calling it again does nothing."""


class OrtSession:
    """`Session` over onnxruntime. Loading maps the weights and prepares them for this CPU (some 0.2 s for 135 MB)."""

    def __init__(
        self,
        graph: Path,
        model: Model,
        threads: int,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        preparing: Path | None = None,
    ) -> None:
        """graph: path of the ONNX file, whose weights lie beside it; preparing: as `load_graph`.

        Raises: SessionError.
        """
        self._model = model
        self._inference = load_graph(graph, threads, providers, preparing)
        by_kernels = providers[0] == CPU and kernels.attend(graph)
        # Without kernels, keys and values have the fixed scales alone: rows are as long as a head.
        self._scale_bytes = model.kv.scale_bytes if by_kernels else 0
        self.cache = KVCache(model, scale_bytes=self._scale_bytes)
        self._binding = self._inference.io_binding()
        self._unbound = False
        self._ids = np.zeros((1, 0), np.int64)
        self._mask = np.ones((1, 0), np.int64)
        self._keep = np.zeros(1, np.int64)
        self._logits = np.zeros((1, 0, model.vocab_size), np.float32)
        self._room = self._logits
        self._bind_input("logits_to_keep", self._keep)
        self._bind_output("logits", self._logits)
        self._errors = onnxruntime_errors()
        # onnxruntime's own operators do not all take 0 rows: where it computes layers, a step has logits of one.
        whole = providers[0] == CPU and kernels.serve(graph) and kernels.compute_layers(graph)
        self._least_kept = 0 if whole else 1
        self.least_rows = _FLOAT_CACHE_ROWS if model.kv.type == "float32" and not by_kernels else 1
        self.piece_tokens = KERNELS_PIECE_TOKENS if by_kernels else PIECE_TOKENS

    @property
    def length(self) -> int:
        return self.cache.length

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        padding = max(0, self.least_rows - len(token_ids))
        rows = len(token_ids) + padding
        try:
            self._prepare(rows, max(keep, self._least_kept) + padding)
            self._ids[0, : len(token_ids)] = token_ids
            if padding:
                self._ids[0, len(token_ids) :] = token_ids[-1]
            self._inference.run_with_iobinding(self._binding)
        except self._errors as error:
            reason = " ".join(str(error).split())
            raise SessionError(
                f"a step of {rows} tokens at position {self.length} failed: {reason}; {_REPAIR}"
            ) from error
        self.cache.length += len(token_ids)
        return self._logits[0, :keep]

    def expect(self, positions: int) -> None:
        self.cache.expected = positions

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self.length

    def rewind(self, length: int) -> None:
        self.cache.truncate(length)

    def rows(self, max_rows: int) -> OrtRowsSession:
        """Several sequences over the same graph, in a cache of their own."""
        return OrtRowsSession(self._inference, self._model, max_rows, self.piece_tokens, self._scale_bytes)

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
            # Steps that check guesses keep more rows than others: they share one buffer. Larger ones do not stay.
            size = max(keep, _SHARED_ROWS)
            if size != self._room.shape[1]:
                self._room = zeros((1, size, self._model.vocab_size), np.float32)
            self._logits = self._room[:, :keep]
            self._bind_output("logits", self._logits)
        self._keep[0] = keep or _NO_ROWS
        # The one binding of every step, in the way that takes 20 microseconds in place of 55.
        self._binding.bind_cpu_input("attention_mask", self._mask[:, : self.length + rows])

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        # The address of a numpy array: the binding keeps no reference, the arrays are attributes of this object.
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def least_rows(session: Session) -> int:
    """Rows that each step of a session has, were it for one token; those beyond its tokens are padding."""
    return session.least_rows if isinstance(session, OrtSession) else 1


def best_piece(session: Session) -> int:
    """Tokens of a prompt that a session takes at once: fewer or more are slower."""
    return int(getattr(session, "piece_tokens", PIECE_TOKENS))


def make_session(
    graph: Path,
    model: Model,
    threads: int,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    preparing: Path | None = None,
) -> Session:
    """The session that fits the graph's way of caching, and the memory that the first provider computes in. preparing:
    as `load_graph`. Raises: SessionError."""
    device = device_of(providers[0])
    if device is not None:
        from .device_session import DeviceSession

        return DeviceSession(*_load_on_device(graph, threads, providers), model, device)
    if model.cache_layout == "in_place":
        return OrtSession(graph, model, threads, providers, preparing)
    from .concat_session import ConcatSession

    return ConcatSession(load_graph(graph, threads, providers, preparing), model)


def _load_on_device(graph: Path, threads: int, providers: Sequence[str]) -> tuple[Any, bool]:
    """onnxruntime's session, and whether it can capture steps as CUDA graphs: not if anything is computed on the CPU
    in between, as in bundles of older versions and in some models."""
    try:
        return load_graph(graph, threads, providers, captures=True), True
    except SessionError as error:
        _logger.info("steps are not captured as CUDA graphs: %s", error)
        return load_graph(graph, threads, providers), False


def open_session(
    bundle: Bundle, threads: int | None = None, prepare: bool = False, provider: str | None = None
) -> Session:
    """Check every file of a bundle against its digest and load the model.

    threads: None for the physical cores; prepare: use the bundle's prepared form (`edgelm.runtime.prepared`), or make
    it, on CPUs; provider: "cpu" or "cuda", None for the one that the bundle was made for.
    The weights are checked in a thread while onnxruntime loads them; the small files, which onnxruntime and tokenizers
    parse, before. Raises: SettingsError, BundleCorruptError, MemoryShortageError, SessionError.
    """
    return _checked(bundle, threads, prepare, provider)()


def _checked(bundle: Bundle, threads: int | None, prepare: bool, provider: str | None) -> Callable[[], Session]:
    """What loads the model, once the small files are found right."""
    count = _thread_count(threads)
    chosen = choose_provider(bundle.manifest, provider, load_onnxruntime().get_available_providers())
    warning = foreign_machine(bundle.manifest)
    if warning is not None:
        _logger.warning("%s", warning)
    weights = [name for name in bundle.manifest.files if name.endswith(".data")]
    bundle.check_files(bundle.manifest.files.keys() - set(weights))
    return lambda: _open_weights(bundle, weights, count, prepare, chosen)


def _open_weights(bundle: Bundle, weights: Sequence[str], threads: int, prepare: bool, provider: str) -> Session:
    # Kernels read the weights as they are in the bundle: there is nothing to prepare.
    wanted = prepare and provider == CPU and not kernels.serve(bundle.path / GRAPH_NAME)
    prepared = prepared_for(bundle.manifest.digest) if wanted else None
    if prepared is not None and prepared.is_there():
        session = _open_prepared(bundle, prepared, threads)
        if session is not None:
            return session
    size = sum(bundle.manifest.files[name].bytes for name in weights)
    require_memory(size, bundle.path)
    with ThreadPoolExecutor(1) as pool:
        weights_checked = pool.submit(bundle.check_files, weights)
        if prepared is not None and prepared.is_worth_it(size):
            session = _open_and_prepare(bundle, prepared, threads, weights_checked)
        else:
            session = make_session(bundle.path / GRAPH_NAME, bundle.manifest.model, threads, [provider])
        weights_checked.result()
    return session


def _open_prepared(bundle: Bundle, prepared: Prepared, threads: int) -> Session | None:
    """The session over a prepared form; None if that was damaged, which forgets it."""
    try:
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(prepared.check)
            session = make_session(prepared.graph, bundle.manifest.model, threads)
            checked.result()
    except (CacheCorruptError, SessionError) as error:
        _logger.warning("%s; the bundle itself is loaded, and prepared anew", error)
        prepared.drop()
        return None
    return session


def _open_and_prepare(bundle: Bundle, prepared: Prepared, threads: int, checked: Future[None]) -> Session:
    """The session over the bundle, and its prepared form for the next time, once the weights are found right."""
    graph, model = bundle.path / GRAPH_NAME, bundle.manifest.model
    session: Session | None = None
    try:
        with prepared.making() as folder:
            session = make_session(graph, model, threads, preparing=folder)
            checked.result()
    except (OSError, SessionError) as error:
        _logger.warning("the model cannot be kept prepared for this machine (%s): it loads as slowly next time", error)
    return session or make_session(graph, model, threads)


def session_numerics(session: Session) -> str:
    """As `machine.numerics`, with the GPU where the session computes on one."""
    device = getattr(session, "device", "cpu")
    return machine.numerics() if device == "cpu" else f"{machine.numerics()} {device} {' + '.join(gpu_names())}"


def open_folder(
    path: str | Path,
    threads: int | None = None,
    graph: str | None = None,
    prepare: bool = False,
    provider: str | None = None,
) -> tuple[Bundle, Session]:
    """Load the model of a folder, be it a bundle or what another exporter wrote (see `edgelm.runtime.foreign`).

    graph: for the latter, which of several ONNX files, relative to the folder; prepare, provider: as `open_session`,
    but what another exporter wrote runs on the CPU.
    Raises: BundleError and below for the folder, SettingsError, SessionError.
    """
    bundle, load_model = find_folder(path, threads, graph, prepare, provider)
    return bundle, load_model()


def find_folder(
    path: str | Path, threads: int | None, graph: str | None, prepare: bool, provider: str | None
) -> tuple[Bundle, Callable[[], Session]]:
    """`open_folder` in two parts: a bundle whose small files are found right, and what loads its model then."""
    from . import foreign

    folder = Path(path)
    if foreign.is_foreign(folder):
        if provider not in (None, "cpu"):
            raise SettingsError(f"{folder} is of another exporter, which edgelm runs on the CPU: leave out  {provider}")
        found, session = foreign.open_foreign(folder, graph, _thread_count(threads))  # the graph describes the model
        return found, lambda: session
    bundle = Bundle.open(folder)
    if graph is not None:
        raise SettingsError(f"{folder} is a bundle, which has one graph: leave out  graph={graph}")
    return bundle, _checked(bundle, threads, prepare, provider)


def require_memory(weights_bytes: int, folder: Path) -> None:
    """Raise MemoryShortageError if a model with so many bytes of weights cannot be loaded: onnxruntime maps their file
    and keeps a copy of each matrix in the order of its kernel. (A prepared form is mapped alone.)"""
    require_bytes(weights_bytes, f"the model of {folder}", "close other programs, or export a smaller model")


def _thread_count(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise SettingsError(f"threads must be 1 or more, found {threads}")
    return threads or machine.default_threads()


def load_graph(
    graph: Path, threads: int, providers: Sequence[str], preparing: Path | None = None, *, captures: bool = False
) -> Any:
    """onnxruntime's session over a graph, with edgelm's settings.

    preparing: a folder to which the graph and the weights are written as they are prepared for this machine's kernels;
    captures: on CUDA, able to capture runs as CUDA graphs.
    Raises: SessionError, also for a graph that cannot be captured.
    """
    onnxruntime = load_onnxruntime()
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise SessionError(f"onnxruntime has no {missing[0]} here: install the onnxruntime package that has it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A graph that cannot be captured is no failure: it is loaded again.
    options.log_severity_level = 4 if captures else 3
    # The arena keeps what the longest prompt needed for good. Without it memory falls back; speed is the same here.
    options.enable_cpu_mem_arena = False
    if machine.saturates_int8():
        # Weights become uint8 at load: slower, but sums do not overflow 16 bits on CPUs without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if preparing is not None:
        options.optimized_model_filepath = str(preparing / GRAPH_NAME)
        for name, value in _PREPARING.items():
            options.add_session_config_entry(f"session.{name}", value)
    with mapped_errors(f"could not load {graph}", _REPAIR):
        if providers[0] == CPU and kernels.serve(graph):
            kernels.register(options, threads, kernels.compute_layers(graph))
        settings = [{"enable_cuda_graph": "1"} if captures and name == CUDA else {} for name in providers]
        session = onnxruntime.InferenceSession(graph, options, providers=list(zip(providers, settings, strict=True)))
    require_used(providers[0], session.get_providers())
    return session
