"""Text and tokens without generating: `POST /tokenize`, `/detokenize`, `/apply-template`, as llama.cpp has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...errors import EdgelmError
from ..context import context_of
from ..http.body import read_fields
from ..http.errors import JsonResponse, api_error, invalid
from ..http.fields import Fields
from ..models import Lease
from ..tools.declared import tools_of
from .messages import messages_of
from .prompting import ChatPrompt, options_of, render


async def tokenize(request: Request) -> Response:
    """`content` (a text) or `messages`, as token ids with their count. Raises: ApiError, ClientGoneError."""
    return await _with_model(request, _tokenize)


async def detokenize(request: Request) -> Response:
    """`tokens` as a text. Raises: ApiError, ClientGoneError."""
    return await _with_model(request, _detokenize)


async def apply_template(request: Request) -> Response:
    """`messages` as the text that the model is given. Raises: ApiError, ClientGoneError."""
    return await _with_model(request, _apply_template)


async def _with_model(request: Request, answer: Callable[[Fields, Lease], dict[str, Any]]) -> Response:
    context = context_of(request)
    fields = await read_fields(request, context.settings)
    lease = await context.models.lease(fields.text("model"))
    try:
        return JsonResponse(await asyncio.to_thread(answer, fields, lease))
    except EdgelmError as error:
        raise api_error(error, "messages" if fields.given("messages") else "content") from error
    finally:
        lease.release()


def _tokenize(fields: Fields, lease: Lease) -> dict[str, Any]:
    tokenizer = lease.engine.tokenizer
    if fields.given("messages"):
        ids, _ = render(lease, _prompt(fields))
    else:
        text = fields.text("content") if fields.given("content") else fields.needed_text("prompt")
        ids = tokenizer.encode(text or "", special=fields.flag("add_special"))
    tokens: list[Any] = list(ids)
    if fields.flag("with_pieces"):
        tokens = [{"id": token, "piece": tokenizer.token_bytes(token).decode("utf-8", "replace")} for token in ids]
    return {"tokens": tokens, "count": len(ids), "max_model_len": lease.engine.bundle.manifest.model.context_length}


def _detokenize(fields: Fields, lease: Lease) -> dict[str, Any]:
    ids, size = fields.items("tokens"), lease.engine.tokenizer.vocab_size
    if ids is None:
        raise invalid("tokens is missing: give token ids", "tokens")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise invalid(f"tokens must be ids from 0 to {size - 1}, found {token!r:.40}", "tokens")
    return {"content": lease.engine.tokenizer.decode(ids)}


def _apply_template(fields: Fields, lease: Lease) -> dict[str, Any]:
    ids, _ = render(lease, _prompt(fields))
    return {"prompt": lease.engine.tokenizer.decode(ids, special=True)}


def _prompt(fields: Fields) -> ChatPrompt:
    return ChatPrompt(messages_of(fields), tools_of(fields), options_of(fields))
