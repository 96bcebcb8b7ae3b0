"""`GET /openapi.json`: the interface in OpenAPI's words, for tools that read it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .http.errors import JsonResponse

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": "object"}


def _number(least: float | None = None, most: float | None = None) -> Schema:
    limits = {"minimum": least, "maximum": most}
    return {"type": ["number", "null"], **{name: value for name, value in limits.items() if value is not None}}


def _whole(least: int, most: int | None = None) -> Schema:
    return {**_number(least, most), "type": ["integer", "null"]}


_SAMPLING: dict[str, Schema] = {
    "model": {"type": ["string", "null"]},
    "stream": _FLAG,
    "temperature": _number(0),
    "top_p": _number(0, 1),
    "top_k": _whole(-1),
    "min_p": _number(0, 1),
    "seed": _whole(-(2**63), 2**63),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]},
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "min_tokens": _whole(0),
    "timeout": _number(0.001),
    "regex": {"type": ["string", "null"]},
}
_OPENAI_STREAM: dict[str, Schema] = {
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "n": _whole(1),
}
_PARTS: Schema = {
    "type": "array",
    "items": {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}},
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, _PARTS]},
        "tool_calls": {"type": "array", "items": _OBJECT},
        "tool_call_id": _TEXT,
    },
}
_TOOL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"}, "parameters": _OBJECT},
        },
    },
}
_TOOLS: dict[str, Schema] = {
    "tools": {"type": ["array", "null"], "items": _TOOL},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT, {"type": "null"}]},
    "parallel_tool_calls": _FLAG,
}
_FORM: Schema = {
    "type": ["object", "null"],
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _OBJECT},
}
_TEMPLATE: dict[str, Schema] = {
    "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
    "chat_template_kwargs": {"type": ["object", "null"]},
    "continue_final_message": _FLAG,
}
_BODIES: dict[str, tuple[str, list[str], dict[str, Schema]]] = {
    "/v1/chat/completions": (
        "Answer a conversation",
        ["messages"],
        {
            **_TEMPLATE,
            **_SAMPLING,
            **_OPENAI_STREAM,
            **_TOOLS,
            "max_tokens": _whole(1),
            "max_completion_tokens": _whole(1),
            "logprobs": _FLAG,
            "top_logprobs": _whole(0, 20),
            "response_format": _FORM,
        },
    ),
    "/v1/completions": (
        "Continue a text",
        ["prompt"],
        {
            "prompt": {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT, {"type": "integer"}]}}]},
            **_SAMPLING,
            **_OPENAI_STREAM,
            "max_tokens": _whole(1),
            "logprobs": _whole(0, 20),
            "echo": _FLAG,
            "response_format": _FORM,
        },
    ),
    "/v1/responses": (
        "Answer items, without keeping anything",
        ["input"],
        {
            "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _OBJECT}]},
            "instructions": {"type": ["string", "null"]},
            **_SAMPLING,
            "max_output_tokens": _whole(1),
            "include": {"type": ["array", "null"], "items": _TEXT},
            "top_logprobs": _whole(0, 20),
            "text": {"type": ["object", "null"]},
            "tools": {"type": ["array", "null"], "items": _OBJECT},
            "tool_choice": _TOOLS["tool_choice"],
        },
    ),
    "/tokenize": (
        "The token ids of a text or of messages",
        [],
        {"content": {"type": ["string", "null"]}, **_TEMPLATE, "add_special": _FLAG, "with_pieces": _FLAG},
    ),
    "/detokenize": (
        "The text of token ids",
        ["tokens"],
        {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
    ),
    "/apply-template": ("The text that the model is given for messages", ["messages"], _TEMPLATE),
}
_READS = {
    "/v1/models": "The models, with context lengths, sizes and digests",
    "/v1/models/{name}": "One model",
    "/health": "Whether the first model is loaded",
    "/metrics": "Figures for Prometheus",
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


async def openapi(_: Request) -> Response:
    """The description."""
    return JsonResponse(description())


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of all endpoints."""
    from importlib.metadata import version  # late, as it costs a start 30 ms

    reads = {path: {"get": _operation(summary, path)} for path, summary in _READS.items()}
    writes = {
        path: {"post": _operation(summary, path, (needed, fields))}
        for path, (summary, needed, fields) in _BODIES.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgelm", "version": version("edgelm")},
        "paths": {**writes, **reads},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(summary: str, path: str, body: tuple[list[str], dict[str, Schema]] | None = None) -> dict[str, Any]:
    media = "text/plain" if path == "/metrics" else "application/json"
    answers: dict[str, Any] = {"200": {"description": "The answer", "content": {media: {"schema": {}}}}}
    if body is not None:
        answers["200"]["content"]["text/event-stream"] = {"schema": {}}
    error = {"content": {"application/json": {"schema": _ERROR}}}
    answers["default"] = {"description": "An error", **error}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if body is not None:
        needed, fields = body
        schema = {"type": "object", "required": needed, "properties": fields}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    return operation
