"""Clients that disconnect, wait, or send and read slowly, over real connections."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from edgelm.runtime import Engine, load
from edgelm.runtime.server import running

from .served import eventually, listening, saying_engine, session_of, with_template

LONG = "z" * 1500
PAUSE_S = 0.02
LARGEST_HEAD = 1 << 14  # h11's limit for the headers of a request
FLOOD = 1 << 25  # more than the system's buffers hold


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with saying_engine(tmp_path, LONG, pause_s=PAUSE_S) as engine:
        yield engine


def request_bytes(stream: bool, content: str = "hi", **fields: Any) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": content}], "stream": stream, **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_still(engine: Engine) -> bool:
    """Return whether no more steps are computed."""
    before = session_of(engine).steps_done
    time.sleep(6 * PAUSE_S)
    return session_of(engine).steps_done == before


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(engine: Engine, stream: bool) -> None:
    session = session_of(engine)
    with listening(engine) as address:
        with connect(address) as client:
            client.sendall(request_bytes(stream))
            assert eventually(lambda: session.steps_done > 5)
            left = session.steps_done
        assert eventually(lambda: is_still(engine))
        assert session.steps_done <= left + 8, "the current step, and this test's own delay"
        assert httpx.get(f"{address}/metrics").text.count('requests_processing{model="fake"} 0') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_is_not_computed_for_a_client_that_left(tmp_path: Path, stream: bool) -> None:
    with saying_engine(tmp_path, LONG, pause_s=0.3, context=30_000) as engine:
        session = session_of(engine)
        with listening(engine) as address:
            with connect(address) as client:
                client.sendall(request_bytes(stream, "x" * 20_000))
                assert eventually(lambda: session.steps_done > 1)
                left = session.steps_done
            time.sleep(1.2)
            assert session.steps_done <= left + 2


def test_a_waiting_request_is_dropped_when_its_client_leaves(engine: Engine) -> None:
    session = session_of(engine)
    with listening(engine) as address, connect(address) as first:
        first.sendall(request_bytes(True))
        assert eventually(lambda: session.steps_done > 3)
        with connect(address) as second:
            second.sendall(request_bytes(True, "another"))
            assert eventually(lambda: 'requests_processing{model="fake"} 2' in httpx.get(f"{address}/metrics").text)
            assert eventually(lambda: 'requests_deferred{model="fake"} 1' in httpx.get(f"{address}/metrics").text)
        assert eventually(lambda: 'requests_processing{model="fake"} 1' in httpx.get(f"{address}/metrics").text)
    assert eventually(lambda: is_still(engine))
    assert not any(bytes(session.tokens).count(word) for word in (b"another",))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files")
def test_200_disconnecting_clients_leave_no_threads_files_or_rows(tiny_bundle: Path, tmp_path: Path) -> None:
    """A real model with several rows. Clients leave at random times while queued, in prefill or in decode."""
    random = Random(5)  # noqa: S311, to make runs repeatable
    bundle = with_template(tiny_bundle, tmp_path / "tiny")
    long = {"max_tokens": 250, "logit_bias": {"256": -100}}
    with load(bundle, threads=1, response_cache=False) as engine, listening({"fake": engine}) as address:

        def idle() -> bool:
            return 'requests_processing{model="fake"} 0' in httpx.get(f"{address}/metrics").text

        def counts() -> tuple[int, int, int]:
            """Threads, open files, rows."""
            files = list(Path("/proc/self/fd").iterdir())
            return threading.active_count(), len(files), len(engine._scheduler._decoder.rows)

        def leave(number: int) -> tuple[int, int]:
            """Send a request and disconnect at a random moment. Returns how many requests were running and waiting."""
            content = f"{number} " + "x" * random.choice([10, 200])
            with connect(address) as client:
                client.sendall(request_bytes(random.random() < 0.6, content, **long))
                time.sleep(random.random() * 0.08)
                return engine.requests

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(leave, range(40)))  # starts threads that are kept
            assert eventually(idle, 30)
            before = counts()
            moments = list(pool.map(leave, range(100, 300)))
            assert any(waiting for _, waiting in moments) and any(computed for computed, _ in moments)
            assert eventually(idle, 30)
            still = eventually(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)))
            assert still and engine.requests == (0, 0), f"{before} before, {counts()} after"
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == engine.generate("a", max_tokens=3).text


def test_a_full_queue_refuses_with_retry_after(engine: Engine) -> None:
    with listening(engine, max_waiting=2) as address, connect(address) as first, connect(address) as second:
        for client in (first, second):
            client.sendall(request_bytes(True))
        assert eventually(lambda: 'requests_processing{model="fake"} 2' in httpx.get(f"{address}/metrics").text)
        body = {"messages": [{"role": "user", "content": "third"}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error" and answer.json()["error"]["code"] == "queue_full"


def test_a_body_that_does_not_arrive_times_out(engine: Engine) -> None:
    with listening(engine, body_timeout_s=0.3) as address, connect(address) as client:
        client.sendall(request_bytes(False)[:-5])
        answer = b"".join(iter(lambda: client.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive" in answer


def test_a_silent_connection_is_closed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "HEAD_TIMEOUT_S", 0.3)
    with listening(engine) as address, connect(address) as silent, connect(address) as half:
        half.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert silent.recv(100) == b"" and half.recv(100) == b""
        assert httpx.get(f"{address}/health").status_code == 200


def unfinished_head(size: int) -> bytes:
    """The beginning of a request, whose headers go on."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"X-%d: %s\r\n" % (number, b"y" * 100) for number in range(size // 100)
    )
    return head[:size]


@pytest.fixture
def sizes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what the server reads from its connections, piece by piece."""
    sizes: list[int] = []
    receive = running._Connection.data_received

    def counted(connection: running._Connection, data: bytes) -> None:
        sizes.append(len(data))
        receive(connection, data)

    monkeypatch.setattr(running._Connection, "data_received", counted)
    return sizes


def test_a_head_of_the_largest_size_is_answered(engine: Engine, sizes_read: list[int]) -> None:
    with listening(engine) as address, connect(address) as client:
        client.sendall(unfinished_head(LARGEST_HEAD))
        assert eventually(lambda: sum(sizes_read) == LARGEST_HEAD)
        client.sendall(b"\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_head_of_one_byte_more_is_refused(engine: Engine) -> None:
    """All that was sent was read, so closing the connection does not reset it, and the answer arrives."""
    with listening(engine) as address, connect(address) as client:
        client.sendall(unfinished_head(LARGEST_HEAD + 1))
        answer = b"".join(iter(lambda: client.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 400") and answer.endswith(b"Invalid HTTP request received.")


def test_a_flood_of_headers_is_not_read(engine: Engine, sizes_read: list[int]) -> None:
    """The connection is closed while headers are on their way, which resets it: the answer may be lost."""
    with listening(engine) as address:
        with connect(address) as client, pytest.raises(ConnectionError):
            client.sendall(unfinished_head(FLOOD))
        assert LARGEST_HEAD < sum(sizes_read) <= LARGEST_HEAD + max(sizes_read) < FLOOD / 10
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    with (
        saying_engine(tmp_path, "y" * 60_000, context=80_000) as engine,
        listening(engine, send_timeout_s=0.5) as address,
        connect(address) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request_bytes(True, logprobs=True, top_logprobs=20, n=4))
        assert eventually(lambda: 'requests_processing{model="fake"} 1' in httpx.get(f"{address}/metrics").text)
        assert eventually(lambda: 'requests_processing{model="fake"} 0' in httpx.get(f"{address}/metrics").text, 60)
