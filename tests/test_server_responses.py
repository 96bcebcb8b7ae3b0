"""`POST /v1/responses`: bodies, items, events, and OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from starlette.testclient import TestClient

from edgelm.runtime import Engine

from .served import client_of, events_of, listening, saying_engine
from .test_tool_calls import RIGHT, TOOLS, TWO

PATH = "/v1/responses"
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    def answer(prompt: str) -> str:
        return f"Let me see.\n{TWO['tagged']}" if "weather?" in prompt else "Hello there"

    with saying_engine(tmp_path_factory.mktemp("responses"), answer) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of({"fake": engine}) as client:
        yield client


def test_a_response_has_openais_shape(client: TestClient) -> None:
    body = client.post(PATH, json={"input": "hi", "instructions": "Be kind.", "temperature": 0}).json()
    response = Response.model_validate(body, strict=False)
    assert response.output_text == "Hello there" and response.status == "completed"
    assert body["object"] == "response" and body["id"].startswith("resp_") and body["store"] is False
    (item,) = body["output"]
    assert item["id"].startswith("msg_") and item["status"] == "completed" and item["role"] == "assistant"
    usage = body["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert usage["output_tokens"] == len("Hello there") and "cached_tokens" in usage["input_tokens_details"]
    assert body["instructions"] == "Be kind." and body["previous_response_id"] is None


def test_a_truncated_response_is_incomplete(client: TestClient) -> None:
    body = client.post(PATH, json={"input": "hi", "max_output_tokens": 3}).json()
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "Hel" and body["output"][0]["status"] == "incomplete"


def test_events_come_in_openais_order(client: TestClient) -> None:
    text = client.post(PATH, json={"input": "hi", "stream": True}).text
    events = events_of(text)
    names = [event["type"] for event in events]
    deltas = names.count("response.output_text.delta")
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")] == names
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == "Hello there"
    assert events[2]["item"]["content"] == [] and events[-1]["response"]["output"][0]["content"][0]["text"]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


def test_tool_calls_are_items(client: TestClient) -> None:
    asked = {"input": "weather?", "tools": FLAT}
    body = client.post(PATH, json=asked).json()
    Response.model_validate(body, strict=False)
    assert [item["type"] for item in body["output"]] == ["message", "function_call", "function_call"]
    call = body["output"][1]
    assert call["name"] == "weather" and json.loads(call["arguments"]) == json.loads(RIGHT)
    events = events_of(client.post(PATH, json={**asked, "stream": True}).text)
    names = [event["type"] for event in events]
    assert names.count("response.function_call_arguments.done") == 2
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    assert json.loads(done["arguments"]) == json.loads(RIGHT)
    required = {"input": "hi", "tools": FLAT, "tool_choice": {"type": "function", "name": "now"}}
    assert client.post(PATH, json=required).json()["output"][0]["name"] == "now"


def test_a_conversation_of_items_reaches_the_template(engine: Engine, client: TestClient) -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ]
    counted = client.post(PATH, json={"input": items}).json()["usage"]["input_tokens"]
    text = (
        "<system>Be kind.\n<user>hi\n<assistant>yes\n"
        '<assistant><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
        "<user><tool_response>\nnoon\n</tool_response>\n<assistant>"
    )
    assert counted == len(text)


def test_json_by_schema(client: TestClient) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    form = {"type": "json_schema", "name": "n", "schema": {"enum": [5]}}
    schema = {"type": "object", "properties": {"n": form["schema"]}, "required": ["n"], "additionalProperties": False}
    asked = {"input": "hi", "text": {"format": {**form, "schema": schema}}, "max_output_tokens": 300}
    body = client.post(PATH, json=asked).json()
    assert json.loads(body["output"][0]["content"][0]["text"]) == {"n": 5}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post(PATH, json={"input": "hi", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_openais_client_reads_responses(engine: Engine) -> None:
    with (
        listening({"fake": engine}) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.responses.create(model="fake", input="hi")
        assert answer.output_text == "Hello there"
        with client.responses.stream(model="fake", input="hi") as stream:
            assert [event.type for event in stream][-1] == "response.completed"
            assert stream.get_final_response().output_text == "Hello there"


def test_a_failure_in_the_middle_is_an_event(tmp_path: Path) -> None:
    def fail(_: str) -> str:
        raise RuntimeError("broken")

    with saying_engine(tmp_path, fail) as engine, client_of(engine) as client:
        last = events_of(client.post(PATH, json={"input": "hi", "stream": True}).text)[-1]
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
