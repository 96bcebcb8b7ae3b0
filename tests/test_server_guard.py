"""Access to the server: host names, origins, keys, and the requests that are allowed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edgelm.runtime import Engine
from edgelm.runtime.errors import SettingsError
from edgelm.runtime.server import ServerSettings

from .served import JSON, chat, client_of, events_of, saying_engine

BODY = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "a-secret-key"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with saying_engine(tmp_path_factory.mktemp("guard")) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine, origins=("https://friend.example",), max_body_bytes=2000) as client:
        yield client


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine, api_keys=(KEY, "another")) as client:
        yield client


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST"])
def test_names_of_this_machine_are_served(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "::1", ""])
def test_other_host_names_are_refused(client: TestClient, host: str) -> None:
    for path in ("/health", "/", "/v1/models"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_a_server_for_all_names_serves_them(engine: Engine) -> None:
    with client_of(engine, hosts=None) as client:
        assert client.get("/health", headers={"Host": "any.example"}).status_code == 200
    with client_of(engine, hosts=("edge.example",)) as client:
        assert client.get("/health", headers={"Host": "edge.example:80"}).status_code == 200
        assert client.get("/health", headers={"Host": "localhost"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "https://friend.example.evil"]
)
def test_pages_of_other_origins_are_refused(client: TestClient, origin: str) -> None:
    answer = client.post("/v1/chat/completions", json=BODY, headers={"Origin": origin})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/chat/completions", headers=asked).status_code == 403


def test_the_servers_own_page_and_named_ones_may_call(client: TestClient) -> None:
    own = client.post("/v1/chat/completions", json=BODY, headers={"Origin": "http://localhost"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    friend = {"Origin": "https://friend.example"}
    answer = client.post("/v1/chat/completions", json=BODY, headers=friend)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert "origin" in answer.headers["vary"].lower()
    asked = {
        **friend,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, authorization",
    }
    answer = client.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 204 and answer.headers["access-control-allow-headers"] == "content-type, authorization"
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_preflight_request_needs_no_key(engine: Engine) -> None:
    """Browsers send no key with a preflight request."""
    with client_of(engine, api_keys=(KEY,), origins=("https://friend.example",)) as client:
        asked = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/models", headers=asked).status_code == 204
        refused = client.get("/v1/models", headers={"Origin": "https://friend.example"})
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_only_json_is_read(client: TestClient, kind: str | None) -> None:
    answer = client.post("/v1/chat/completions", content=b"{}", headers={} if kind is None else {"Content-Type": kind})
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_json_with_a_charset_is_json(client: TestClient) -> None:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/tokenize", content=b'{"content": "a"}', headers=kind).status_code == 200


def test_a_body_that_is_too_large_is_refused(client: TestClient) -> None:
    answer = chat(client, "x" * 3000)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    assert client.post("/v1/chat/completions", content=pieces(), headers=JSON).status_code == 413


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_a_key_is_asked_for(locked: TestClient, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
        answer = locked.get(path, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "authentication_error"


def test_each_key_is_accepted_in_both_headers(locked: TestClient) -> None:
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"authorization": "bearer another"}, {"X-Api-Key": KEY}):
        assert locked.get("/v1/models", headers=headers).status_code == 200
        assert locked.post("/v1/chat/completions", json=BODY, headers=headers).status_code == 200


def test_health_and_the_page_need_no_key(locked: TestClient) -> None:
    assert locked.get("/health").status_code == 200
    assert locked.get("/").status_code == 200
    assert locked.post("/health", json={}).status_code == 405


@pytest.mark.parametrize("changes", [{"max_waiting": 0}, {"api_keys": ("a b",)}, {"api_keys": ("",)}, {"ping_s": -1}])
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        ServerSettings(**changes)  # type: ignore[arg-type]


def test_prompts_are_logged_only_where_it_is_asked_for(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with client_of(engine) as client:
        chat(client, "a secret of mine")
        chat(client, "a secret of mine", stream=True)
        chat(client, "a secret of mine", temperature=-1)
    assert "secret" not in caplog.text and "POST /v1/chat/completions 200" in caplog.text
    with client_of(engine, log_prompts=True) as client:
        chat(client, "a secret of mine")
    assert "a secret of mine" in caplog.text


def test_no_answer_contains_a_local_path(engine: Engine, tmp_path: Path) -> None:
    with client_of({"loaded": engine, "gone": tmp_path / "gone"}) as client:
        answers = [
            client.get("/v1/models"),
            client.get("/openapi.json"),
            client.get("/metrics"),
            chat(client, model="gone"),
            chat(client, model="loaded"),
        ]
    assert answers[3].status_code == 404
    assert not [answer.text for answer in answers if str(tmp_path) in answer.text or "/home" in answer.text]


def test_silent_streams_send_keep_alive_comments(tmp_path: Path) -> None:
    with saying_engine(tmp_path, pause_s=0.3) as engine, client_of(engine, ping_s=0.1) as client:
        found = events_of(chat(client, stream=True, max_tokens=2).text)
        comments = [item for item in found if isinstance(item, str) and item.startswith(":")]
        assert len(comments) >= 3 and all(comment.startswith(": ") for comment in comments)
        with_none = events_of(chat(client, "again", stream=True, max_tokens=1).text)
        assert with_none[-1] == "[DONE]"
    with saying_engine(tmp_path, pause_s=0.3) as engine, client_of(engine, ping_s=0) as client:
        assert not [item for item in events_of(chat(client, stream=True, max_tokens=2).text) if str(item)[0] == ":"]
