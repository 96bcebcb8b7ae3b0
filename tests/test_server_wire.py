"""The HTTP interface: bodies, events, errors and headers, as OpenAI's clients expect them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm.runtime import Engine

from .served import JSON, chat, client_of, events_of, saying_engine, session_of

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with saying_engine(tmp_path_factory.mktemp("wire"), "Hello there", cache=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of({"fake": engine}, max_body_bytes=100_000) as client:
        yield client


# ---- answers


def test_a_chat_is_answered_as_openai_writes_it(client: TestClient, engine: Engine) -> None:
    answer = chat(client, "hi", model="fake", timeout=100)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "fake"
    assert body["system_fingerprint"] == engine.bundle.manifest.digest
    (choice,) = body["choices"]
    message = {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len("Hello there")
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens"}
    assert answer.headers["x-request-id"].startswith("req_")


def test_the_answer_is_the_one_of_generate(client: TestClient, engine: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "what?"}]
    done = engine.generate(messages=messages, max_tokens=7)
    body = chat(client, "what?", max_tokens=7).json()
    assert body["choices"][0]["message"]["content"] == done.text == "Hello t"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == done.stats.prompt_tokens


def test_a_stream_has_role_content_reason_and_end(client: TestClient) -> None:
    answer = chat(client, "stream", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello there"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_has_usage_only_where_it_is_asked_for(client: TestClient) -> None:
    answer = chat(client, "usage", stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events_of(answer.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len("Hello there")


def test_no_event_has_an_id_or_is_empty(client: TestClient) -> None:
    text = chat(client, "plain", stream=True).text
    assert not [
        line for line in text.splitlines() if line and not line.startswith("data: {") and line != "data: [DONE]"
    ]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_max_tokens_are_accepted(client: TestClient, name: str) -> None:
    body = chat(client, f"limit {name}", **{name: 3}).json()
    assert body["choices"][0] == {**body["choices"][0], "finish_reason": "length"}
    assert body["usage"]["completion_tokens"] == 3


def test_a_cached_answer_is_marked(client: TestClient) -> None:
    first, second = chat(client, "once more", max_tokens=4), chat(client, "once more", max_tokens=4)
    assert "x-edgelm-cache" not in first.headers and second.headers["x-edgelm-cache"] == "hit"
    assert first.json()["choices"] == second.json()["choices"]
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == second.json()["usage"]["prompt_tokens"]


def test_several_choices_differ_where_they_are_drawn_and_repeat_with_a_seed(client: TestClient) -> None:
    asked = {"n": 3, "temperature": 30.0, "seed": -5, "max_tokens": 12}
    first, second = chat(client, "draw", **asked).json(), chat(client, "draw", **asked).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3 and [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    alone = chat(client, "draw", **{**asked, "n": 1}).json()
    assert alone["choices"][0]["message"]["content"] == texts[0]
    assert first["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert first["usage"]["completion_tokens"] >= alone["usage"]["completion_tokens"]


def test_a_stream_of_several_choices_holds_each_in_order(client: TestClient) -> None:
    whole = chat(client, "both", n=2, temperature=9, seed=1, max_tokens=9).json()
    texts, ended = {0: "", 1: ""}, []
    for chunk in events_of(chat(client, "both", n=2, temperature=9, seed=1, max_tokens=9, stream=True).text)[:-1]:
        for choice in chunk["choices"]:
            assert choice["index"] not in ended
            texts[choice["index"]] += choice["delta"].get("content", "")
            ended += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(ended) == [0, 1]
    assert [texts[0], texts[1]] == [choice["message"]["content"] for choice in whole["choices"]]


def test_stop_texts_end_the_answer(client: TestClient) -> None:
    for stop in ("lo", ["zz", "lo"]):
        choice = chat(client, "halt", stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "stop")
    assert chat(client, "halt", stop=None).json()["choices"][0]["message"]["content"] == "Hello there"


def test_logit_bias_bans_and_forces(client: TestClient) -> None:
    content = chat(client, "bias", logit_bias={str(ord("X")): 100}, max_tokens=4).json()["choices"][0]["message"]
    assert content["content"] == "XXXX"


def test_settings_without_effect_are_accepted(client: TestClient) -> None:
    for fields in ({"temperature": 0, "top_p": 0.9}, {"top_p": 1}, {"top_p": 0, "temperature": 2}, {"top_k": -1}):
        assert chat(client, "narrow", **fields).json()["choices"][0]["message"]["content"] == "Hello there"


def test_logprobs_of_a_chat(client: TestClient) -> None:
    entries = chat(client, "sure", logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == "Hello there"
    assert all(entry["bytes"] == list(entry["token"].encode()) and entry["logprob"] < 0 for entry in entries)
    assert all(
        len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries
    )
    streamed = events_of(chat(client, "sure", logprobs=True, top_logprobs=2, stream=True).text)[:-1]
    found = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [entry for part in found if part for entry in part["content"]] == entries


def test_a_completion_continues_texts_and_ids(client: TestClient) -> None:
    ids = list(b"Once")
    bodies = [
        client.post(TEXT_PATH, json={"prompt": prompt, "max_tokens": 5}).json() for prompt in ("Once", ids, [ids])
    ]
    assert all(body["choices"] == bodies[0]["choices"] for body in bodies)
    choice = {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}
    assert bodies[0]["choices"] == [choice] and bodies[0]["object"] == "text_completion"
    both = client.post(TEXT_PATH, json={"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 5}).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["usage"]["prompt_tokens"] == len("Once") + len("Twice")


def test_a_completion_has_openais_default_length_echo_and_logprobs(client: TestClient) -> None:
    body = client.post(TEXT_PATH, json={"prompt": "Echo ", "echo": True, "temperature": 20, "seed": 4}).json()
    assert body["usage"]["completion_tokens"] <= 16 and body["choices"][0]["text"].startswith("Echo ")
    body = client.post(TEXT_PATH, json={"prompt": "P", "logprobs": 1, "max_tokens": 3}).json()
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["H", "e", "l"] and found["text_offset"] == [0, 1, 2]
    assert [list(top) for top in found["top_logprobs"]] == [["H"], ["e"], ["l"]]


def test_a_completion_streams(client: TestClient) -> None:
    body = {"prompt": ["Once", "Twice"], "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events_of(client.post(TEXT_PATH, json=body).text)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "Hello", 1: "Hello"} and done == "[DONE]" and last["usage"]["completion_tokens"] == 10


def test_models_say_their_context_size_and_digest(client: TestClient, engine: Engine) -> None:
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "fake" and entry["object"] == "model" and entry["loaded"] is True
    assert entry["max_model_len"] == entry["context_length"] == entry["meta"]["n_ctx_train"] == 2000
    assert entry["digest"] == engine.bundle.manifest.digest and entry["meta"]["size"] > 0
    assert client.get("/v1/models/fake").json() == entry
    assert client.get("/health").json() == {"status": "ok"}


def test_tokens_and_templates(client: TestClient) -> None:
    assert client.post("/tokenize", json={"content": "abc"}).json()["tokens"] == [97, 98, 99]
    pieces = client.post("/tokenize", json={"content": "ab", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}]
    assert client.post("/detokenize", json={"tokens": [97, 98, 99]}).json() == {"content": "abc"}
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    prompt = client.post("/apply-template", json=asked).json()["prompt"]
    assert prompt == "<user>hi\n<assistant>"
    counted = client.post("/tokenize", json=asked).json()
    assert counted["count"] == len(prompt) and counted["max_model_len"] == 2000


def test_metrics_count_requests(client: TestClient) -> None:
    before = _figures(client)
    chat(client, "count me", max_tokens=6)
    after = _figures(client)
    assert (
        after['edgelm:tokens_predicted_total{model="fake"}']
        == before['edgelm:tokens_predicted_total{model="fake"}'] + 6
    )
    assert after['edgelm:requests_processing{model="fake"}'] == 0
    assert after['edgelm:model_loaded{model="fake"}'] == 1


def _figures(client: TestClient) -> dict[str, float]:
    text = client.get("/metrics").text
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}


def test_contents_of_every_shape(client: TestClient, engine: Engine) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    asked = {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]}
    assert client.post("/apply-template", json=asked).json()["prompt"] == "<system>be kind\n<user>hi\n<assistant>"
    asked = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}
    assert client.post("/apply-template", json=asked).json()["prompt"] == "<user>a\n<assistant>\n<assistant>"


def test_unknown_fields_are_ignored(client: TestClient) -> None:
    asked = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "no_such_field": [1]}
    assert chat(client, "unknown", **asked).status_code == 200


# ---- errors


def wrong(client: TestClient, body: Any, path: str = CHAT_PATH, status: int = 400) -> dict[str, Any]:
    """The error for a body that is refused."""
    answer = client.post(path, content=body if isinstance(body, str | bytes) else json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"} and error["message"]
    return error


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"regex": "("}, "regex"),
        ({"model": 5}, "model"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, fields: dict[str, Any], param: str | None) -> None:
    error = wrong(client, {"messages": HI, **fields})
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"n": 9}, "n"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ],
)
def test_unsupported_fields_are_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = wrong(client, {"messages": HI, **fields})
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 50_000,
        b'{"a": ' * 10_000,
        b'{"seed": ' + b"9" * 5_000 + b"}",
        b"\x00",
    ],
    ids=["empty", "cut", "list", "null", "text", "bytes", "nan", "deep", "deeper", "digits", "zero"],
)
@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH, "/v1/responses", "/tokenize", "/detokenize", "/apply-template"])
def test_bodies_that_are_no_json_object_are_refused(client: TestClient, body: bytes, path: str) -> None:
    assert wrong(client, body, path)["type"] == "invalid_request_error"


def test_a_lone_surrogate_is_refused_with_a_message(client: TestClient) -> None:
    error = wrong(client, '{"messages": [{"role": "user", "content": "a\\ud800b"}]}')
    assert "surrogate" in error["message"]
    assert "temperature" in wrong(client, '{"messages": [], "temperature": "\\ud800"}')["message"]


def test_a_prompt_beyond_the_context_says_both_numbers(client: TestClient) -> None:
    error = wrong(client, {"messages": [{"role": "user", "content": "x" * 3000}]})
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] == 2000 and error["n_prompt_tokens"] > 3000
    error = wrong(client, {"messages": HI, "max_tokens": 2000})
    assert error["code"] == "context_length_exceeded" and "2,000" in error["message"]
    error = wrong(client, {"messages": HI, "max_tokens": 2000, "stream": True})
    assert error["code"] == "context_length_exceeded"
    assert wrong(client, {"prompt": "x" * 3000}, TEXT_PATH)["code"] == "context_length_exceeded"


def test_an_answer_without_a_limit_may_fill_the_context(tmp_path: Path) -> None:
    with saying_engine(tmp_path, "z" * 500, context=100) as engine, client_of(engine) as client:
        body = chat(client, "fill").json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["total_tokens"] == 101
    with saying_engine(tmp_path, "z" * 500, context=100) as engine, client_of(engine, max_tokens=5) as client:
        assert chat(client, "fill").json()["usage"]["completion_tokens"] == 5


def test_a_deadline_ends_an_answer_with_openais_reason(tmp_path: Path) -> None:
    with saying_engine(tmp_path, "z" * 500, pause_s=0.02) as engine, client_of(engine) as client:
        assert chat(client, "slow", timeout=0.3).json()["choices"][0]["finish_reason"] == "length"


def test_unknown_models_and_paths(client: TestClient) -> None:
    for path, body in ((CHAT_PATH, {"messages": HI, "model": "gpt"}), (TEXT_PATH, {"prompt": "a", "model": "gpt"})):
        error = wrong(client, body, path, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model") and "'fake'" in error["message"]
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/models", json={}).status_code == 405
    assert client.get(CHAT_PATH).json()["error"]["message"].endswith("use POST")


def test_a_bundle_without_a_template_takes_no_messages(tmp_path: Path) -> None:
    with saying_engine(tmp_path, template=None) as engine, client_of(engine) as client:
        error = wrong(client, {"messages": HI})
        assert "no chat template" in error["message"]
        assert client.post(TEXT_PATH, json={"prompt": "a"}).json()["choices"][0]["text"] == "Hello there"


def test_an_internal_error_reveals_nothing_about_the_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with saying_engine(tmp_path) as engine, client_of(engine) as client:
        session_of(engine).answer = lambda _: (_ for _ in ()).throw(RuntimeError(f"broken at {tmp_path}"))
        answer = chat(client, "break")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert str(tmp_path) not in answer.text and str(tmp_path) in caplog.text
        streamed = events_of(chat(client, "break", stream=True).text)
        assert streamed[-1]["error"]["type"] == "server_error" and "[DONE]" not in streamed


@pytest.mark.parametrize("fields", [{"logit_bias": {"99999": 1}}, {"regex": "("}, {"tools": [{"type": "function"}]}])
def test_errors_are_reported_before_a_stream_begins(client: TestClient, fields: dict[str, Any]) -> None:
    assert wrong(client, {"messages": HI, "stream": True, **fields})["param"] is not None
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such"}}}
    assert wrong(client, {"messages": HI, "stream": True, "response_format": form})["param"] == "response_format"


def test_a_silent_stream_says_how_much_of_the_prompt_is_read(tmp_path: Path) -> None:
    with saying_engine(tmp_path, pause_s=0.2) as engine, client_of(engine, ping_s=0.05) as client:
        found = events_of(chat(client, "x" * 1500, stream=True, max_tokens=1).text)
        comments = [item for item in found if isinstance(item, str) and item.startswith(": ")]
        counts = [tuple(map(int, comment.removeprefix(": ").split("/"))) for comment in comments]
        assert {total for _, total in counts} == {1518} and counts == sorted(counts) and counts[0][0] < counts[-1][0]


def test_bodies_have_openais_published_shapes(client: TestClient) -> None:
    """OpenAI's client declares the shapes; it is generated from OpenAI's API description."""
    from openai.types import Completion, Model
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "n": 2, "max_tokens": 4}
    ChatCompletion.model_validate_json(chat(client, **asked).content, strict=True)
    streamed = events_of(chat(client, **asked, stream=True, stream_options={"include_usage": True}).text)[:-1]
    for chunk in streamed:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
    body = {"prompt": "a", "logprobs": 1, "max_tokens": 3}
    Completion.model_validate_json(client.post(TEXT_PATH, json=body).content, strict=True)
    Model.model_validate_json(client.get("/v1/models/fake").content, strict=True)
