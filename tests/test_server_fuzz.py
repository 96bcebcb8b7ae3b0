"""No input makes the server fail: schemathesis (extra `clients`) generates bodies from the server's own description.

Environment: EDGELM_FUZZ_EXAMPLES, per operation (40); EDGELM_FUZZ_SECONDS, of the slow test (60).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from edgelm.runtime.server import ServerSettings, app
from edgelm.runtime.server.openapi import description

from .served import JSON, client_of, client_package, saying_engine

PATHS = [path for path, methods in description()["paths"].items() if "post" in methods]
EXAMPLES = int(os.environ.get("EDGELM_FUZZ_EXAMPLES", "40"))
SECONDS = int(os.environ.get("EDGELM_FUZZ_SECONDS", "60"))

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with saying_engine(tmp_path_factory.mktemp("fuzz"), "ok", context=300) as engine, client_of(engine) as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_any_value_of_any_field_is_answered_or_refused(client: TestClient, path: str) -> None:
    """Bodies that are valid except for a few fields."""
    schema = description()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    right: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "prompt": "hi",
        "input": "hi",
        "tokens": [97],
        "content": "hi",
        "max_tokens": 3,
        "max_output_tokens": 3,
    }
    body = {name: value for name, value in right.items() if name in schema["properties"]}
    if path == "/tokenize":
        del body["messages"]
    assert client.post(path, json=body).status_code == 200

    @settings(max_examples=EXAMPLES * 3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(sorted(schema["properties"])), anything, min_size=1, max_size=3))
    def answered(changes: dict[str, Any]) -> None:
        data = json.dumps({**body, **changes}).encode()
        answer = client.post(path, content=data, headers=JSON)
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    answered()


@pytest.fixture
def operations(tmp_path: Path, clients: None) -> Iterator[list[Any]]:
    """The operations of the server's description, as schemathesis reads it."""
    schemathesis = client_package("schemathesis")
    with saying_engine(tmp_path, "ok", context=300) as engine:
        schema = schemathesis.openapi.from_asgi("/openapi.json", app(engine, ServerSettings(hosts=None)))
        yield [found.ok() for found in schema.get_all_operations()]


def try_operation(operation: Any, examples: int, modes: Sequence[str]) -> int:
    """Send requests that follow an operation's description (positive) or violate it (negative). Returns their
    number."""
    from schemathesis import GenerationMode  # type: ignore[import-not-found]
    from schemathesis.checks import not_a_server_error  # type: ignore[import-not-found]
    from schemathesis.specs.openapi.checks import response_schema_conformance  # type: ignore[import-not-found]

    checked = 0
    for mode in modes:

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
        def each(case: Any) -> None:
            nonlocal checked
            checked += 1
            case.call_and_validate(checks=[not_a_server_error, response_schema_conformance])

        each()
    return checked


def test_schemathesis_finds_no_failure(operations: list[Any]) -> None:
    checked = [try_operation(operation, EXAMPLES, ["positive"]) for operation in operations]
    assert sum(checked) > 5 * EXAMPLES


@pytest.mark.slow
def test_schemathesis_finds_no_failure_for_long(operations: list[Any]) -> None:
    deadline = time.monotonic() + SECONDS
    checked = 0
    while time.monotonic() < deadline:
        for operation in operations:
            modes = ["positive", "negative"] if operation.method.upper() == "POST" else ["positive"]
            checked += try_operation(operation, EXAMPLES, modes)
    print(f"{checked} requests")
    assert checked > SECONDS
