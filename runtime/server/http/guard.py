"""Checks in front of every request: who may call, from where, with what body. Also gives it an id. Knows no model.

The order: Host, Origin (and a browser's preflight), public paths, key, content type, length.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import ServerSettings
from .errors import ApiError, internal

# Paths that need no key: they show nothing of the user's.
OPEN_PATHS = ("/", "/health")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_log = logging.getLogger("edgelm.server")


class Guard:
    """ASGI middleware. Adds `x-request-id` to each response, and turns unexpected errors into status 500."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, name = time.perf_counter(), f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                self._allow_origin(Headers(scope=scope), headers)
            await send(message)

        try:
            await self._checked(scope, receive, answer)
        except Exception:  # any error: the client gets status 500, the log gets the traceback
            _log.exception("%s failed", name)
            if status:
                raise  # the response has begun: the connection is cut
            await internal().response()(scope, receive, answer)
        finally:
            took = (time.perf_counter() - started) * 1000
            _log.info("%s %s %s %d %.0f ms", name, scope["method"], scope["path"], status, took)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            self._check_host(request)
            self._check_origin(request)
            if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
                await _preflight(request)(scope, receive, send)
                return
            self._check_key(request)
            self._check_body(request)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, request: Request) -> None:
        allowed = self._settings.hosts
        host = _without_port(request.headers.get("host", ""))
        if allowed is not None and host not in allowed:
            raise ApiError(
                403,
                f"the Host {host[:80]!r} may not be served here: call the server as {allowed[0]}, or start it with "
                "--allow-host",
                "permission_error",
            )

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is None or origin in self._settings.origins or _same_origin(origin, request.headers.get("host", "")):
            return
        raise ApiError(
            403,
            f"web pages of {origin[:80]!r} may not call this server: start it with --allow-origin",
            "permission_error",
        )

    def _check_key(self, request: Request) -> None:
        if not self._keys or _path(request) in OPEN_PATHS:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        # Compare with all keys, so that the time reveals nothing.
        if not sum(hmac.compare_digest(given.encode("utf-8", "replace"), key) for key in self._keys):
            what = "the API key is wrong" if given else "an API key is missing"
            raise ApiError(
                401,
                f"{what}: send it as  Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_body(self, request: Request) -> None:
        if request.method not in ("POST", "PUT", "PATCH"):
            return
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another origin can send a form or plain text without a preflight, but not JSON.
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON: send it with  Content-Type: application/json")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise body_too_large(self._settings.max_body_bytes)

    def _allow_origin(self, request: Headers, answer: MutableHeaders) -> None:
        origin = request.get("origin")
        if self._settings.origins:
            answer.add_vary_header("Origin")
        if origin is not None and origin in self._settings.origins:
            answer["access-control-allow-origin"] = origin
            answer["access-control-expose-headers"] = "x-request-id, x-edgelm-cache, retry-after"


def body_too_large(most: int) -> ApiError:
    """Status 413."""
    return ApiError(413, f"the body has more than {most:,} bytes: send less", headers={"Connection": "close"})


def limited(most: int) -> Callable[[int], None]:
    """A function that counts the bytes of a body in pieces, and raises ApiError above the limit."""
    total = 0

    def add(count: int) -> None:
        nonlocal total
        total += count
        if total > most:
            raise body_too_large(most)

    return add


def _preflight(request: Request) -> Response:
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": request.headers.get("access-control-request-headers", "content-type"),
            "access-control-max-age": "600",
        },
    )


def _path(request: Request) -> str:
    """The request's path below the mount point of the application."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", "")) or "/"


def _without_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return (name if separator and (port.isdecimal() or not port) and not name.endswith(":") else host).lower()


def _same_origin(origin: str, host: str) -> bool:
    """Whether a page's origin is this server, by the name that the client used."""
    try:
        parts = urlsplit(origin)
    except ValueError:  # half an IPv6 address
        return False
    default = _DEFAULT_PORTS.get(parts.scheme, "")
    return bool(parts.netloc) and parts.netloc.removesuffix(f":{default}") == host.lower().removesuffix(f":{default}")
