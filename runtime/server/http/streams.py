"""Work that ends when the client disconnects, and server-sent events with keep-alive comments."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from ...errors import EdgelmError
from ..settings import ServerSettings
from .errors import api_error, internal, to_json

T = TypeVar("T")
_log = logging.getLogger("edgelm.server")
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the events
)
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection. Nobody is left to tell."""


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name is not None else b""
    return head + b"data: " + to_json(content) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled as soon as the client closes the connection.

    The body must have been read before. Raises: ClientGoneError, and what the work raises.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An answer as server-sent events (an ASGI application of one request).

    In silence a comment is sent every `ping_s` seconds, since proxies and clients would take the connection for dead.
    An error in the middle becomes an event of its own, which ends the stream. `close` is called in any case.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        settings: ServerSettings,
        *,
        comment: Callable[[], str],
        failure: Callable[[dict[str, Any]], bytes],
    ) -> None:
        """comment: gives the comment to send in silence; failure: turns an error's body into an event."""
        self._events = events
        self._close = close
        self._ping_s = settings.ping_s or None
        self._send_timeout_s = settings.send_timeout_s
        self._comment = comment
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._answer(send))
        except (ClientGoneError, OSError):
            _log.info("the client left in the middle of a stream")
        except TimeoutError:
            _log.warning("a client read nothing for %g s and was cut off", self._send_timeout_s)
        finally:
            await self._close()

    async def _answer(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        async with contextlib.aclosing(self._events), contextlib.aclosing(self._with_comments()) as parts:
            try:
                async for data in parts:
                    await self._send(send, data)
            except EdgelmError as error:
                await self._send(send, self._failure(api_error(error).body))
            except (OSError, TimeoutError):
                raise
            except Exception:  # noqa: BLE001, the client is told, in the stream that has begun
                _log.exception("a stream failed")
                await self._send(send, self._failure(internal().body))
        await self._send(send, b"", False)

    async def _with_comments(self) -> AsyncGenerator[bytes, None]:
        pending: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                pending = pending or asyncio.create_task(_next(self._events))
                await asyncio.wait({pending}, timeout=self._ping_s)
                if not pending.done():
                    yield f": {self._comment()}\n\n".encode()
                    continue
                data, pending = pending.result(), None
                if data is None:
                    return
                yield data
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        # Not `wait_for`: before Python 3.12 it loses a cancellation that comes while it ends.
        async with asyncio.timeout(self._send_timeout_s):
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
