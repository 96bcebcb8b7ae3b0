"""The body of a request, within the server's limits of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from ..settings import ServerSettings
from .errors import ApiError
from .fields import Fields, parse_json
from .guard import limited
from .streams import ClientGoneError


async def read_fields(request: Request, settings: ServerSettings) -> Fields:
    """The body's JSON object. Raises: ApiError; ClientGoneError."""
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError as error:
        raise ApiError(
            408, f"the body did not arrive within {settings.body_timeout_s:g} s", headers={"Connection": "close"}
        ) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return Fields(parse_json(data))


async def _read(request: Request, most: int) -> bytes:
    count, parts = limited(most), []
    async for part in request.stream():
        count(len(part))
        parts.append(part)
    return b"".join(parts)
