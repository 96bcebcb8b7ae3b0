"""Errors in the form that OpenAI's clients read: status, `{"error": {...}}`, headers; edgelm's errors are mapped to it.

No message contains a path of this machine: errors about bundles and files are logged, and the client is told so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ...errors import (
    ContextLengthError,
    EdgelmError,
    EngineBusyError,
    EngineClosedError,
    MemoryShortageError,
    MissingExtraError,
    PromptError,
    SettingsError,
    TemplateError,
)
from ...settings import GenerationSettings

INVALID = "invalid_request_error"
_SETTINGS = {item.name for item in dataclasses.fields(GenerationSettings)}
# Settings that have another name in requests.
_WIRE_NAMES = {"lark": "tools", "json_schema": "response_format"}
_log = logging.getLogger("edgelm.server")


class ApiError(EdgelmError):
    """An error response with a status of 400 or more. extra: fields besides OpenAI's four."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **(extra or {})}}

    def response(self) -> JsonResponse:
        """The error as a response."""
        return JsonResponse(self.body, self.status, self.headers)


class JsonResponse(Response):
    """JSON in UTF-8. Half of a surrogate pair, which a client may have sent, is written as JSON's escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """Compact JSON on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "backslashreplace"
    )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400 for an invalid request."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, remedy: str) -> ApiError:
    """Status 400 for a feature that OpenAI has and this server lacks. Not 501, which clients would retry."""
    return ApiError(400, f"{param} is not supported: {remedy}", param=param, code="unsupported_parameter")


def too_long(prompt_tokens: int, max_tokens: int | None, context: int) -> ApiError:
    """Status 400 for a prompt that leaves no room for the answer."""
    more = "" if max_tokens is None else f" and max_tokens is {max_tokens:,}"
    return ApiError(
        400,
        # LiteLLM knows the error by these words of OpenAI's.
        f"This model's maximum context length is {context:,} tokens, and the prompt has {prompt_tokens:,}{more}: "
        f"shorten the messages{'' if max_tokens is None else ' or lower max_tokens'}",
        param="messages",
        code="context_length_exceeded",
        extra={"n_prompt_tokens": prompt_tokens, "n_ctx": context},
    )


def busy(waiting: int, seconds: float) -> ApiError:
    """Status 429 for a queue that is full. seconds: when a place may be free."""
    wait = max(1, round(seconds))
    return ApiError(
        429,
        f"{waiting} requests wait already: try again in {wait} s",
        "rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(wait)},
    )


def unavailable(message: str, code: str, seconds: int = 1) -> ApiError:
    """Status 503 for something that will be available soon."""
    return ApiError(503, message, "unavailable_error", code=code, headers={"Retry-After": str(seconds)})


def internal() -> ApiError:
    """Status 500 without details, which are in the log."""
    return ApiError(500, "the server failed: its log says why, under this answer's x-request-id", "server_error")


def api_error(error: EdgelmError, prompt: str = "messages") -> ApiError:  # noqa: PLR0911, one return for each kind
    """The response for an error of edgelm. prompt: the field that the prompt came in."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return invalid(text, prompt, "context_length_exceeded")
    if isinstance(error, SettingsError):
        first, _, rest = text.partition(" ")
        name = _WIRE_NAMES.get(first, first)
        return invalid(f"{name} {rest}", name if first in _SETTINGS else None, "invalid_value")
    if isinstance(error, PromptError | TemplateError):
        return invalid(text, prompt, "invalid_value")
    if isinstance(error, MissingExtraError):
        return invalid(text, None, "unsupported_parameter")
    if isinstance(error, MemoryShortageError):
        return unavailable(text, "memory_shortage", 5)
    if isinstance(error, EngineClosedError | EngineBusyError):
        return unavailable("the model was unloaded: try again", "model_loading")
    _log.error("%s", text, exc_info=error)
    return internal()
