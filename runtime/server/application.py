"""The ASGI application: which path leads to which endpoint, and what happens at its start and end."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..engine import Engine
from ..errors import EdgelmError, SettingsError
from ..opening import load
from .api.chat import chat_completions
from .api.completions import completions
from .api.models import health, list_models, metrics, one_model
from .api.responses import responses
from .api.text import apply_template, detokenize, tokenize
from .context import ServerContext
from .http.errors import ApiError, api_error
from .http.guard import Guard
from .http.streams import ClientGoneError
from .metrics import Metrics
from .models import Models
from .openapi import openapi
from .page import page
from .settings import ServerSettings

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
_CLIENT_GONE = 499  # as proxies log it; nobody reads this answer
_GET: dict[str, Endpoint] = {
    "/health": health,
    "/v1/health": health,
    "/metrics": metrics,
    "/v1/models": list_models,
    "/v1/models/{name:path}": one_model,
    "/openapi.json": openapi,
}
_POST: dict[str, Endpoint] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
}


def app(
    bundles: str | Path | Engine | Mapping[str, str | Path | Engine],
    settings: ServerSettings | None = None,
    *,
    open_engine: Callable[[Path], Engine] = load,
) -> Starlette:
    """Bundles behind OpenAI's interface, as an ASGI application.

    bundles: a folder, an engine, or several of them by the names under which clients call them; the first one answers
    requests that name none. Folders are loaded by `open_engine` when they are needed, the first one at the start, and
    unloaded at the end; engines are not closed. If the application is mounted in another one, the outer one must run
    its lifespan (`application.router.lifespan_context`) for that; docs/server.md has an example.
    Raises: SettingsError without any bundle.
    """
    settings = settings or ServerSettings()
    if isinstance(bundles, Mapping) and not bundles:
        raise SettingsError("there is nothing to serve: give at least one bundle")
    models = Models(_named(bundles), open_engine, settings)
    application = Starlette(
        routes=[
            *(Route(path, _endpoint(call), methods=["GET"]) for path, call in _GET.items()),
            *(Route(path, _endpoint(call), methods=["POST"]) for path, call in _POST.items()),
            *([Route("/", page, methods=["GET"])] if settings.page else []),
        ],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers={HTTPException: _http_error},
        lifespan=_lifespan,
    )
    application.state.edgelm = ServerContext(settings, models, Metrics())
    return application


@contextlib.asynccontextmanager
async def _lifespan(application: Starlette) -> AsyncIterator[None]:
    models: Models = application.state.edgelm.models
    models.start()
    try:
        yield
    finally:
        await models.close()


def _endpoint(call: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Wrap an endpoint so that its errors become responses."""

    @functools.wraps(call)
    async def answer(request: Request) -> ASGIApp:
        try:
            return await call(request)
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        except EdgelmError as error:
            return api_error(error).response()

    return answer  # type: ignore[return-value]  # Starlette takes any ASGI application


async def _http_error(request: Request, error: Exception) -> Response:
    """Responses for unknown paths and methods, which Starlette refuses itself."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path!r:.100}: the interface is below /v1"
    else:
        message = f"{request.method} is not allowed here: use {(error.headers or {}).get('Allow', 'another method')}"
    return ApiError(error.status_code, message, headers=error.headers).response()


def _named(bundles: str | Path | Engine | Mapping[str, str | Path | Engine]) -> dict[str, Path | Engine]:
    if isinstance(bundles, Mapping):
        return {name: Path(source) if isinstance(source, str) else source for name, source in bundles.items()}
    if isinstance(bundles, Engine):
        return {bundles.bundle.manifest.name: bundles}
    return {Path(bundles).resolve().name: Path(bundles)}
