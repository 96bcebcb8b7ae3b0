"""Each generation setting can be given on the command line and in requests to the server, and is documented."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import GenerationSettings
from edgelm.runtime.commands import chat, run
from edgelm.runtime.commands.settings import settings_of
from edgelm.runtime.server import ServerSettings
from edgelm.runtime.server.api.chat import ChatRequest, read_chat
from edgelm.runtime.server.api.completions import CompletionRequest, read_completion
from edgelm.runtime.server.api.responses import read_response
from edgelm.runtime.server.http.fields import Fields
from edgelm.runtime.server.openapi import description

from .conftest import ROOT
from .test_settings import NAMES, OTHERS

# The value of each setting in OTHERS, as options. FILE stands for a file that holds the value.
OPTIONS: dict[str, list[str]] = {
    "max_tokens": ["--max-tokens", "7"],
    "min_tokens": ["--min-tokens", "2"],
    "temperature": ["--temperature", "0.5"],
    "top_k": ["--temperature", "0.5", "--top-k", "4"],
    "top_p": ["--temperature", "0.5", "--top-p", "0.5"],
    "min_p": ["--temperature", "0.5", "--min-p", "0.5"],
    "repetition_penalty": ["--repetition-penalty", "1.1"],
    "presence_penalty": ["--presence-penalty=-0.1"],
    "frequency_penalty": ["--frequency-penalty", "0.1"],
    "logit_bias": ["--logit-bias", "3=-inf"],
    "seed": ["--temperature", "0.5", "--seed", "1"],
    "stop": ["--stop", "a"],
    "stop_token_ids": ["--stop-token-id", "3"],
    "logprobs": ["--logprobs", "0"],
    "json_schema": ["--json-schema", "FILE"],
    "regex": ["--regex", "a+"],
    "lark": ["--lark", "FILE"],
    "timeout": ["--timeout", "3"],
    "context_full": ["--context-full", "slide"],
    "keep": ["--context-full", "slide", "--keep", "4"],
    "lookup": ["--no-lookup"],
    "special_tokens": ["--special-tokens"],
}
# `edgelm chat` prints the text alone.
NOT_IN_CHAT = {"logprobs"}
# Settings that no request can hold, each with the reason.
NOT_IN_REQUESTS = {
    "lark": "the server sets it itself, for calls of functions",
    "context_full": "the server limits each answer to the room that its prompt leaves, so no context is ever full",
    "keep": "belongs to context_full",
    "lookup": "changes no answer",
    "special_tokens": "the server sets it itself, where it reads thoughts and calls from an answer",
}
IN_REQUESTS = [name for name in NAMES if name not in NOT_IN_REQUESTS]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}
# Fields of requests that have another name or value than the settings in OTHERS.
FIELDS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {"3": -5}},  # JSON has no infinity
    "json_schema": {"response_format": SCHEMA},
}
# By path: its reader, the least body, and what differs from the other endpoints.
ENDPOINTS: dict[str, tuple[Callable[..., ChatRequest | CompletionRequest], dict[str, Any], dict[str, dict[str, Any]]]]
ENDPOINTS = {
    "/v1/completions": (read_completion, {"prompt": "a"}, {}),
    "/v1/chat/completions": (
        read_chat,
        {"messages": [{"role": "user", "content": "a"}]},
        {"logprobs": {"logprobs": True, "top_logprobs": 0}},
    ),
    "/v1/responses": (
        read_response,
        {"input": "a"},
        {
            "max_tokens": {"max_output_tokens": 7},
            "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 0},
            "json_schema": {"text": {"format": {**SCHEMA["json_schema"], "type": "json_schema"}}},
        },
    ),
}


def parsed(command: Any, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["bundle", *words])


def test_these_lists_are_complete() -> None:
    assert list(OPTIONS) == NAMES
    assert NOT_IN_REQUESTS.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_an_option(name: str, tmp_path: Path) -> None:
    wanted = GenerationSettings(**OTHERS[name])
    assert getattr(wanted, name) != getattr(GenerationSettings(), name)
    file = tmp_path / "file"
    file.write_text(str(getattr(wanted, name)), encoding="utf-8")
    words = [str(file) if word == "FILE" else word for word in OPTIONS[name]]
    assert settings_of(parsed(run, words)) == wanted
    if name not in NOT_IN_CHAT:
        assert settings_of(parsed(chat, words)) == wanted


def body_of(endpoint: str, name: str) -> dict[str, Any]:
    """The fields of a request that stand for a setting."""
    return ENDPOINTS[endpoint][2].get(name) or FIELDS.get(name) or OTHERS[name]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("name", IN_REQUESTS)
def test_each_setting_is_a_field_of_requests(name: str, endpoint: str) -> None:
    read, least, _ = ENDPOINTS[endpoint]
    body = body_of(endpoint, name)
    wanted = GenerationSettings(**{**OTHERS[name], **({"logit_bias": {3: -5}} if name == "logit_bias" else {})})
    assert getattr(read(Fields({**least, **body}), ServerSettings()).settings, name) == getattr(wanted, name)
    schema = description()["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body.keys() <= schema["properties"].keys()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("name", NOT_IN_REQUESTS)
def test_these_settings_are_no_fields(name: str, endpoint: str) -> None:
    read, least, _ = ENDPOINTS[endpoint]
    assert getattr(read(Fields({**least, **OTHERS[name]}), ServerSettings()).settings, name) == getattr(
        GenerationSettings(), name
    )
    assert f'"{name}"' not in str(description()).replace("'", '"')


def test_the_table_of_settings_is_complete() -> None:
    """Rows of docs/generation.md may hold several settings."""
    document = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    table = document.partition("| setting |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(NAMES)


def test_the_list_of_fields_is_complete() -> None:
    document = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", document.partition("### Fields\n")[2].strip().partition("\n\n")[0]))
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        assert {field for name in IN_REQUESTS for field in body_of(endpoint, name)} <= listed
    assert not NOT_IN_REQUESTS.keys() & listed
