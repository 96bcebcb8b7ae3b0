"""Run the server: bind a port or a Unix socket, cut off slow connections, let answers finish at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import EdgelmError, SettingsError
from .models import Models
from .parent import when_the_pipe_closes

_log = logging.getLogger("edgelm.server")
# A connection that has not sent its whole head within this time is closed.
HEAD_TIMEOUT_S = 15.0
_MAX_CONNECTIONS = 256
_BACKLOG = 128
_KEEP_ALIVE_S = 30
_WATCH_S = 0.05
# Windows has a signal of its own for Ctrl-Break and for closing the console.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


@dataclass(frozen=True)
class Listening:
    """Where to listen and how to end. unix: a socket's path, instead of host and port; port 0: any free one; drain_s:
    how long running answers may take after the signal to end; with_parent: also end when the program that started this
    one dies, or closes the pipe on standard input."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix: Path | None = None
    drain_s: float = 30.0
    with_parent: bool = False


class ServerStartError(EdgelmError):
    """The server cannot listen where it was told to."""


def bind(where: Listening) -> socket.socket:
    """The listening socket. Raises: ServerStartError, if another program uses the address or the socket."""
    if where.unix is not None:
        return _bind_unix(where.unix)
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerStartError(f"the host {where.host!r} is not known ({error.strerror}): give an address") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # on Windows, another program could otherwise share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ServerStartError(
            f"{where.host} port {where.port} cannot be used ({error.strerror}): choose another --port, or end the "
            "program that has it"
        ) from error
    return listener


def make_server(application: Starlette, drain_s: float) -> uvicorn.Server:
    """uvicorn as edgelm runs it. drain_s: as in `Listening`."""
    return _Server(
        uvicorn.Config(
            application,
            http=_Connection,
            loop="asyncio",
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
    )


def run(application: Starlette, listener: socket.socket, where: Listening, started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, or until the parent ends. started: called once the first model is loaded.

    Raises: EdgelmError, if the first model cannot be loaded.
    """
    server = make_server(application, where.drain_s)
    models: Models = application.state.edgelm.models
    try:
        asyncio.run(_serve(server, listener, where, models, started))
    finally:
        listener.close()
        if where.unix is not None:
            where.unix.unlink(missing_ok=True)
    if models.failure is not None:
        raise models.failure


async def _serve(
    server: uvicorn.Server, listener: socket.socket, where: Listening, models: Models, started: Callable[[], None]
) -> None:
    if where.with_parent:
        loop = asyncio.get_running_loop()
        when_the_pipe_closes(lambda: loop.call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None))
    watcher = asyncio.create_task(_watch(server, models, started))
    await server.serve(sockets=[listener])
    watcher.cancel()


async def _watch(server: uvicorn.Server, models: Models, started: Callable[[], None]) -> None:
    """Wait for the first model; end the server if it cannot be loaded."""
    while not models.ready:
        if models.failure is not None:
            server.should_exit = True
            return
        await asyncio.sleep(_WATCH_S)
    started()


class _Server(uvicorn.Server):
    """uvicorn that ends at a signal without re-raising it, so that sockets are removed and the exit status is 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Connection(H11Protocol):
    """uvicorn's connection, closed if the head of its first request does not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._check_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _check_head(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            _log.info("a connection sent no request within %g s and was closed", HEAD_TIMEOUT_S)
            self.transport.close()


def _bind_unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise SettingsError("this system has no unix sockets: use --host and --port")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            _remove_stale(path)
        except OSError as error:
            raise ServerStartError(f"{path} cannot be a socket ({error.strerror}): give another path") from error
        else:
            raise ServerStartError(f"another program listens on {path}: give another path, or end it")
    listener: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ServerStartError(f"{path} cannot be a socket ({error.strerror}): give another path") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed server left. Raises: ServerStartError if the path is not a socket."""
    if not path.is_socket():
        raise ServerStartError(f"{path} is there and no socket: give another path")
    path.unlink()


def address_of(listener: socket.socket, where: Listening) -> str:
    """The server's URL."""
    if where.unix is not None:
        return f"unix:{where.unix}"
    name: Any = listener.getsockname()
    host = where.host if where.host not in ("", "0.0.0.0", "::") else "127.0.0.1"  # noqa: S104, compared only
    return f"http://{f'[{host}]' if ':' in host else host}:{name[1]}"
