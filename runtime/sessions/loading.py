"""Load a bundle, or a folder of another exporter, into the session that fits it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..bundle.folder import GRAPH_NAME, Bundle
from ..bundle.manifest import Model
from ..errors import CacheCorruptError, SessionError, SettingsError, shown
from ..host import machine
from ..host.ort import load_onnxruntime
from . import kernels
from .graph import load_graph, require_memory
from .in_place import OrtSession
from .prepared import Prepared, prepared_for
from .protocol import Session
from .providers import CPU, choose_provider, device_of, foreign_machine

# More than any machine has: onnxruntime starts as many threads as it is told.
_MOST_THREADS = 1024

_logger = logging.getLogger(__name__)


def make_session(
    graph: Path,
    model: Model,
    threads: int,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    preparing: Path | None = None,
    *,
    use: kernels.Use | None = None,
) -> Session:
    """The kind of session that fits the graph's cache and the first provider's device. preparing: as `load_graph`; use:
    as `OrtSession`. Raises: SessionError."""
    device = device_of(providers[0])
    if device is not None:
        from .on_device import DeviceSession

        return DeviceSession(*_load_on_device(graph, threads, providers), model, device)
    if model.cache_layout == "in_place":
        return OrtSession(graph, model, threads, providers, preparing, use=use)
    from .concatenated import ConcatSession

    use = use or kernels.use_in(graph, providers[0])
    return ConcatSession(load_graph(graph, threads, providers, preparing, use=use), model)


def _load_on_device(graph: Path, threads: int, providers: Sequence[str]) -> tuple[Any, bool]:
    """onnxruntime's session, and whether it can capture steps as CUDA graphs. It cannot if an operator runs on the CPU,
    as in bundles of older versions and in some models."""
    try:
        return load_graph(graph, threads, providers, captures=True), True
    except SessionError as error:
        _logger.info("steps are not captured as CUDA graphs: %s", error)
        return load_graph(graph, threads, providers), False


def open_session(
    bundle: Bundle, threads: int | None = None, prepare: bool | None = False, provider: str | None = None
) -> Session:
    """Check every file of a bundle against its digest and load the model.

    threads: None for the physical cores; prepare: True uses the bundle's prepared form on CPUs and makes it if there is
    none, None uses an existing one, False none; provider: "cpu" or "cuda", None for the one that the bundle was made
    for. Small files are checked before they are parsed, weights in a thread while onnxruntime loads them. Raises:
    SettingsError, BundleCorruptError, MemoryShortageError, SessionError.
    """
    return _checked(bundle, threads, prepare, provider)()


def _checked(bundle: Bundle, threads: int | None, prepare: bool | None, provider: str | None) -> Callable[[], Session]:
    """Check the small files. Returns a function that loads the model."""
    count = _thread_count(threads)
    chosen = choose_provider(bundle.manifest, provider, load_onnxruntime().get_available_providers())
    warning = foreign_machine(bundle.manifest)
    if warning is not None:
        _logger.warning("%s", warning)
    weights = [name for name in bundle.manifest.files if name.endswith(".data")]
    bundle.check_files(bundle.manifest.files.keys() - set(weights))
    return lambda: _open_weights(bundle, weights, count, prepare, chosen)


def _open_weights(bundle: Bundle, weights: Sequence[str], threads: int, prepare: bool | None, provider: str) -> Session:
    use = kernels.use_in(bundle.path / GRAPH_NAME, provider)
    # Kernels read the weights as they are in the bundle: there is nothing to prepare.
    wanted = prepare is not False and provider == CPU and not use.serve
    prepared = prepared_for(bundle.manifest.digest, asked=bool(prepare)) if wanted else None
    if prepared is not None and prepared.is_there():
        session = _open_prepared(bundle, prepared, threads)
        if session is not None:
            return session
    size = sum(bundle.manifest.files[name].bytes for name in weights)
    # Kernels read the weights where they are mapped: pages that the system may drop.
    require_memory(0 if use.compute_layers else size, bundle.path)
    with ThreadPoolExecutor(1) as pool:
        weights_checked = pool.submit(bundle.check_files, weights)
        if prepare and prepared is not None and prepared.is_worth_it(size):
            session = _open_and_prepare(bundle, prepared, threads, weights_checked)
        else:
            session = make_session(bundle.path / GRAPH_NAME, bundle.manifest.model, threads, [provider], use=use)
        weights_checked.result()
    return session


def _open_prepared(bundle: Bundle, prepared: Prepared, threads: int) -> Session | None:
    """The session over a prepared form; None if that is damaged, and then deleted."""
    try:
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(prepared.check)
            session = make_session(prepared.graph, bundle.manifest.model, threads)
            checked.result()
    except (CacheCorruptError, SessionError) as error:
        _logger.warning("%s; it is removed, and the bundle itself is loaded", error)
        prepared.drop()
        return None
    return session


def _open_and_prepare(bundle: Bundle, prepared: Prepared, threads: int, checked: Future[None]) -> Session:
    """The session over the bundle. Also writes the prepared form for the next load, if the weights' digests are
    right."""
    graph, model = bundle.path / GRAPH_NAME, bundle.manifest.model
    session: Session | None = None
    try:
        with prepared.making() as folder:
            session = make_session(graph, model, threads, preparing=folder)
            checked.result()
    except (OSError, SessionError) as error:
        _logger.warning("the model cannot be kept prepared for this machine (%s): it loads as slowly next time", error)
    return session or make_session(graph, model, threads)


def open_folder(
    path: str | Path,
    threads: int | None = None,
    graph: str | None = None,
    prepare: bool | None = False,
    provider: str | None = None,
) -> tuple[Bundle, Session]:
    """Load the model of a folder: a bundle, or a folder of another exporter (`foreign`).

    graph: for another exporter's folder, which of several ONNX files, relative to the folder; prepare, provider: as
    `open_session`, but a folder of another exporter runs on the CPU only.
    Raises: BundleError and below for the folder, SettingsError, SessionError.
    """
    bundle, load_model = find_folder(path, threads, graph, prepare, provider)
    return bundle, load_model()


def find_folder(
    path: str | Path, threads: int | None, graph: str | None, prepare: bool | None, provider: str | None
) -> tuple[Bundle, Callable[[], Session]]:
    """`open_folder` in two parts: a bundle whose small files are checked, and a function that loads its model."""
    from ..bundle.foreign_graphs import is_foreign
    from .foreign import open_foreign

    folder = Path(path)
    if is_foreign(folder):
        if provider not in (None, "cpu"):
            raise SettingsError(f"{folder} is of another exporter, which edgelm runs on the CPU: leave out  {provider}")
        found, session = open_foreign(folder, graph, _thread_count(threads))  # the graph describes the model
        return found, lambda: session
    bundle = Bundle.open(folder)
    if graph is not None:
        raise SettingsError(f"{folder} is a bundle, which has one graph: leave out  graph={graph}")
    return bundle, _checked(bundle, threads, prepare, provider)


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return machine.default_threads()
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise SettingsError(f"threads must be 1 or more, at most {_MOST_THREADS:,}, found {shown(threads)}")
    return threads
