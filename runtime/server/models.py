"""The server's bundles by name: loaded when a request needs them, unloaded when others need their memory.

Everything here runs on one event loop; loading and closing run in threads.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..bundle.folder import CHAT_TEMPLATE_NAME, GRAPH_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, Bundle
from ..bundle.manifest import Manifest
from ..engine import Engine
from ..errors import BundleError, BundleMissingError, EdgelmError, MemoryShortageError
from ..host.memory import available_bytes
from .http.errors import ApiError, api_error, busy, unavailable
from .settings import ServerSettings

_log = logging.getLogger("edgelm.server")
_GUESSED_S = 5.0  # an answer's time, before one was measured


@dataclass
class Model:
    """A bundle by name. engine: None while it is not loaded; size: its estimated memory in bytes; users: requests that
    run or wait; used: the number of the last request for it; template: the source of the chat template, "" without one;
    seconds: how long recent answers took."""

    name: str
    path: Path | None
    engine: Engine | None = None
    size: int = 0
    users: int = 0
    used: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    template: str = ""
    loading: asyncio.Task[None] | None = None
    seconds: float = _GUESSED_S


class Lease:
    """A loaded model that stays loaded until `release`. Calling that again does nothing."""

    def __init__(self, model: Model, engine: Engine, changed: Callable[[], None]) -> None:
        self.name = model.name
        self.engine = engine
        self.template = model.template
        self._model = model
        self._changed = changed
        self._started = time.perf_counter()
        self._held = True

    def release(self) -> None:
        """Give the model back."""
        if self._held:
            self._held = False
            self._model.users -= 1
            took = time.perf_counter() - self._started
            self._model.seconds += (took - self._model.seconds) / 8
            self._changed()


class Models:
    """All models of a server. Use it on one event loop."""

    def __init__(
        self, bundles: Mapping[str, Path | Engine], open_engine: Callable[[Path], Engine], settings: ServerSettings
    ) -> None:
        """bundles: folders, or loaded engines, which stay loaded; the first one answers requests that name none."""
        self._models = {_same(name): _model(_same(name), source) for name, source in bundles.items()}
        self._open = open_engine
        self._settings = settings
        self._clock = itertools.count(1)
        self._changed = asyncio.Event()
        self._room = asyncio.Lock()
        self._first = next(iter(self._models))
        self.first_load: asyncio.Task[None] | None = None
        self.failure: EdgelmError | None = None
        self.ready = self._models[self._first].engine is not None
        self.memory = settings.memory_bytes or available_bytes() // 2

    def __iter__(self) -> itertools.chain[Model]:
        return itertools.chain(self._models.values())

    def find(self, name: str | None) -> Model:
        """The model of a request. Raises: ApiError (404), which lists the models."""
        model = self._models.get(self._first if name is None else _same(name))
        if model is None:
            raise ApiError(
                404,
                f"there is no model {name!r:.80} here: there is {', '.join(map(repr, self._models))}",
                param="model",
                code="model_not_found",
            )
        return model

    def start(self) -> None:
        """Begin to load the first model; then the server is ready. Calling it again does nothing."""
        if not self.ready and self.first_load is None:
            self.first_load = asyncio.create_task(self._load_first())

    async def _load_first(self) -> None:
        try:
            await self._loaded(self._models[self._first])
            self.ready = True
        except EdgelmError as error:
            self.failure = error
            _log.error("%s cannot be loaded: %s", self._first, error)
        finally:
            self.first_load = None

    async def lease(self, name: str | None) -> Lease:
        """A loaded model. Raises: ApiError: 404 for an unknown one, 429 if too many requests wait for it, 503 while the
        server starts, 500 if it cannot be loaded."""
        model = self.find(name)
        if model.users >= self._settings.max_waiting:
            raise busy(model.users, model.seconds)
        if not self.ready and self.first_load is not None:
            raise unavailable("the model is being loaded: try again in a second", "model_loading")
        model.users += 1
        model.used = next(self._clock)
        try:
            engine = await self._loaded(model)
        except BaseException as error:
            model.users -= 1
            if isinstance(error, EdgelmError):
                raise _load_error(model, error) from error
            raise
        self.ready = True
        return Lease(model, engine, self._changed.set)

    async def close(self) -> None:
        """Unload the models that were loaded here, after waiting for running requests."""
        for model in self._models.values():
            if model.loading is not None:
                await asyncio.gather(model.loading, return_exceptions=True)
            if model.path is not None:
                await self._drop(model)

    async def _loaded(self, model: Model) -> Engine:
        if model.engine is None:
            if model.loading is None:
                model.loading = asyncio.create_task(self._load(model))
            # A waiting request may be cancelled; the loading continues for the others.
            await asyncio.shield(model.loading)
        assert model.engine is not None, "the loading ended without an error"
        return model.engine

    async def _load(self, model: Model) -> None:
        assert model.path is not None, "an engine that was given is loaded"
        try:
            async with self._room:
                model.size = await asyncio.to_thread(_size, model.path)
                await self._make_room(model)
                started = time.perf_counter()
                engine = await asyncio.to_thread(self._open, model.path)
                model.engine, model.template = engine, template_source(engine.bundle)
                model.created = int(time.time())
                _log.info("loaded %s in %.1f s", model.name, time.perf_counter() - started)
        finally:
            model.loading = None

    async def _make_room(self, model: Model) -> None:
        """Unload unused models, the least recently used first; wait if all are in use."""
        if model.size > self.memory:
            raise MemoryShortageError(
                f"the model {model.name!r} takes {model.size >> 20:,} MiB and the server may use "
                f"{self.memory >> 20:,} MiB: start it with a larger --memory"
            )
        while sum(other.size for other in self._models.values() if other.engine is not None) + model.size > self.memory:
            idle = [other for other in self._models.values() if other.engine and other.path and not other.users]
            if idle:
                await self._drop(min(idle, key=lambda other: other.used))
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _drop(self, model: Model) -> None:
        engine, model.engine = model.engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)
            _log.info("unloaded %s", model.name)


def _same(name: str) -> str:
    """A name in one normal form: folder names on macOS may store letters and accents separately."""
    return unicodedata.normalize("NFC", name)


def _model(name: str, source: Path | Engine) -> Model:
    if isinstance(source, Path):
        return Model(name, source)
    return Model(name, None, source, template=template_source(source.bundle))


def _load_error(model: Model, error: EdgelmError) -> ApiError:
    """The error for the client, without the paths that errors about bundles contain."""
    if isinstance(error, BundleMissingError):
        _log.error("%s: %s", model.name, error)
        return ApiError(404, f"the model {model.name!r} is gone from the disk", param="model", code="model_not_found")
    if isinstance(error, BundleError):
        _log.error("%s: %s", model.name, error)
        message = f"the model {model.name!r} cannot be loaded: the server's log says why"
        return ApiError(500, message, "server_error")
    return api_error(error)


def template_source(bundle: Bundle) -> str:
    """The source of a bundle's chat template, "" without one."""
    text = bundle.read_text(CHAT_TEMPLATE_NAME)
    if text:
        return text
    found = json.loads(bundle.read_text(TOKENIZER_CONFIG_NAME) or "{}").get("chat_template")
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def _size(path: Path) -> int:
    """Estimated memory of a loaded bundle: graph, weights, tokenizer and the KV cache of one text. Raises:
    BundleError."""
    try:
        manifest = Bundle.open(path).manifest
    except BundleMissingError:
        # Another exporter's folder has no manifest. A deleted one has no files either; loading reports that.
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    held = (GRAPH_NAME, WEIGHTS_NAME, TOKENIZER_NAME)
    return sum(entry.bytes for name, entry in manifest.files.items() if name in held) + cache_bytes(manifest)


def cache_bytes(manifest: Manifest) -> int:
    """The KV cache of a text as long as the context, in bytes."""
    size = {"int8": 1, "float16": 2}.get(manifest.model.kv.type, 4)
    layers = [layer for layer in manifest.model.layers if layer is not None]
    return manifest.model.context_length * sum(
        layer.kv_heads * (layer.key_size + layer.value_size) * size for layer in layers
    )
