"""The generation fields that chat, completions and responses share, as `GenerationSettings`."""

from __future__ import annotations

from typing import Any

from ...settings import GenerationSettings
from ..http.errors import invalid, unsupported
from ..http.fields import Fields

MAX_TOP_LOGPROBS = 20
_SEEDS = 2**64
_NO_LIMIT = 2**31
# Fields with the same name in GenerationSettings, both OpenAI's and ours.
_NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "timeout")
_DRAWING = ("top_p", "min_p")
_OPENAI_TEMPERATURE = 1.0


def settings_of(fields: Fields, max_tokens: int | None) -> GenerationSettings:
    """The body's settings, except log-probabilities and structure. max_tokens: the request's limit, None without one.

    Without a temperature answers are greedy, unless another field needs one: then it is OpenAI's default. Raises:
    ApiError; SettingsError.
    """
    given: dict[str, Any] = {"max_tokens": max_tokens or _NO_LIMIT}
    given |= {name: fields.number(name) for name in _NUMBERS if fields.given(name)}
    if fields.given("min_tokens"):
        given["min_tokens"] = fields.whole("min_tokens", 0)
    seed = fields.whole("seed")
    if seed is not None:
        given["seed"] = seed % _SEEDS
    given |= _stops(fields) | _bias(fields) | _drawing(fields)
    if fields.given("regex"):
        given["regex"] = fields.text("regex")
    return GenerationSettings.of(None, given)


def max_tokens_of(fields: Fields, *names: str) -> int | None:
    """The first of the fields that is given. Raises: ApiError."""
    return next((found for name in names if (found := fields.whole(name, 1)) is not None), None)


def structure_of(form: Fields | None) -> dict[str, Any]:
    """Settings for `response_format`. Raises: ApiError."""
    if form is None:
        return {}
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise invalid(f"{form.name('type')} is missing: give text, json_object or json_schema", form.name("type"))
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    # Chat completions wrap the schema in an object of its own, responses do not.
    holder = form.inner("json_schema") or form
    schema = holder.inner("schema")
    if schema is None:
        raise invalid(f"{holder.name('schema')} is missing: give a JSON schema", holder.name("schema"))
    return {"json_schema": schema.values}


def _drawing(fields: Fields) -> dict[str, Any]:
    temperature = fields.number("temperature")
    chosen: dict[str, Any] = {name: fields.number(name) for name in _DRAWING if fields.given(name)}
    if fields.given("top_k"):
        chosen["top_k"] = max(0, fields.whole("top_k") or 0)  # -1 is off in other servers
    narrow = {name: value for name, value in chosen.items() if value not in (0, None) and (name, value) != ("top_p", 1)}
    if temperature is None:
        temperature = _OPENAI_TEMPERATURE if narrow else 0.0
    if temperature < 0:
        raise invalid(f"temperature must be 0 or more, found {temperature:g}", "temperature", "invalid_value")
    # Either way only the most likely token is left, so settings that narrow the draw have no effect.
    if temperature == 0 or chosen.get("top_p") == 0:
        return {"temperature": 0.0}
    return {"temperature": temperature, **narrow}


def _stops(fields: Fields) -> dict[str, Any]:
    stop, found = fields.values.get("stop"), {}
    if stop is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            fields.refuse_type("stop", "a text or a list of texts")
        found["stop"] = [text for text in texts if text]
    ids = fields.items("stop_token_ids")
    if ids is not None:
        found["stop_token_ids"] = ids
    return found


def _bias(fields: Fields) -> dict[str, Any]:
    bias = fields.inner("logit_bias")
    if bias is None:
        return {}
    return {"logit_bias": {_token(bias, name): bias.number(name) or 0.0 for name in bias.values}}


def _token(bias: Fields, name: str) -> int:
    if not name.isascii() or not name.isdecimal() or len(name) > len(str(_SEEDS)):
        raise invalid(f"{bias.path} must map token ids to numbers, found the key {name!r:.40}", bias.path)
    return int(name)


def chat_logprobs(fields: Fields) -> int | None:
    """The number of alternatives that a chat wants for each token; None for no log-probabilities. Raises: ApiError."""
    top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not fields.flag("logprobs"):
        if top is not None:
            raise invalid("top_logprobs needs logprobs: set it to true", "top_logprobs")
        return None
    return top or 0


def streaming_of(fields: Fields) -> tuple[bool, bool]:
    """Whether the answer is a stream, and whether the stream ends with the usage. Raises: ApiError."""
    stream, options = fields.flag("stream"), fields.inner("stream_options")
    if options is not None and not stream:
        raise invalid("stream_options needs stream: set it to true", "stream_options")
    return stream, options is not None and options.flag("include_usage")


def count_of(fields: Fields, most: int) -> int:
    """`n`. Raises: ApiError."""
    count = fields.whole("n", 1, 2**31) or 1
    if count > most:
        raise unsupported("n", f"this server gives at most {most} answers to one request")
    return count
