"""Three servers on this machine share answers through Redis, behind HAProxy, LiteLLM's proxy or LiteLLM's router."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import missing
from .served import Server, client_package, events_of, serving, with_template
from .test_redis_store import Server as RedisServer

proxies = pytest.importorskip("scripts.fleet.proxies", reason="scripts/ is missing")
BODY = {"prompt": "Once upon", "max_tokens": 20}
COUNT = 3


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        missing("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def servers(tiny_bundle: Path, redis: str, tmp_path: Path) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        bundle = with_template(tiny_bundle, tmp_path / "tiny")
        homes = [{"EDGELM_HOME": str(tmp_path / f"home{number}")} for number in range(COUNT)]
        yield [stack.enter_context(serving(f"tiny={bundle}", "--redis", redis, environment=home)) for home in homes]


@pytest.fixture
def proxy(servers: list[Server], tmp_path: Path) -> Iterator[str]:
    """HAProxy's address."""
    if proxies.find(proxies.HAPROXY) is None:
        missing("haproxy is not installed")
    with proxies.running(proxies.HAPROXY, [server.address for server in servers], "tiny", tmp_path) as (address, _):
        yield address


@pytest.fixture
def litellm_proxy(servers: list[Server], tmp_path: Path) -> Iterator[str]:
    """The address of LiteLLM's proxy."""
    if proxies.find(proxies.LITELLM) is None:
        pytest.skip("LiteLLM's proxy is not installed: docs/fleet.md says how to install it into build/litellm")
    with proxies.running(proxies.LITELLM, [server.address for server in servers], "tiny", tmp_path) as (address, _):
        yield address


def answers_of(server: Server) -> int:
    """The number of answers that a server gave."""
    found = re.search(r'answers_total\{model="tiny"\} (\d+)', httpx.get(f"{server.address}/metrics").text)
    assert found is not None
    return int(found[1])


def ask(address: str, session: str, **changes: Any) -> httpx.Response:
    headers = {"X-Session": session}
    return httpx.post(f"{address}/v1/completions", json={**BODY, **changes}, headers=headers, timeout=60)


def test_a_conversation_stays_on_its_server_and_answers_are_shared(proxy: str, servers: list[Server]) -> None:
    first = ask(proxy, "mine")
    assert first.status_code == 200 and "x-edgelm-cache" not in first.headers
    owner = [answers_of(server) for server in servers].index(1)
    for number in range(4):
        ask(proxy, "mine", prompt=f"Once {number}")
    assert [answers_of(server) for server in servers] == [5 if place == owner else 0 for place in range(COUNT)]
    for server in servers:
        known = ask(server.address, "direct")
        assert known.headers["x-edgelm-cache"] == "hit" and known.json()["choices"] == first.json()["choices"]
    sessions = [f"session {number}" for number in range(24)]
    for session in sessions:
        ask(proxy, session)
    assert all(answers_of(server) > 1 for server in servers), "sessions are spread over servers"


def ask_chat(address: str, content: str, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 20, **changes}
    headers = {"X-Session": content, "Authorization": f"Bearer {proxies.MASTER_KEY}"}
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def kill_one(address: str, servers: list[Server]) -> None:
    """Kill a server while four clients ask: only requests that it was computing fail, and no answer is wrong."""
    expected = {prompt: text_of(ask_chat(address, prompt)) for prompt in (f"Once {number}" for number in range(6))}
    failed: list[str] = []
    counts = [0] * 4
    stop = threading.Event()

    def keep_asking(client: int) -> None:
        while not stop.is_set():
            for prompt, text in expected.items():
                try:
                    answer = ask_chat(address, prompt)
                    if answer.status_code != 200:
                        failed.append("in flight")
                    elif text_of(answer) != text:
                        failed.append("wrong")
                except httpx.HTTPError:
                    failed.append("in flight")
                counts[client] += 1

    threads = [threading.Thread(target=keep_asking, args=(client,)) for client in range(len(counts))]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    servers[0].process.send_signal(signal.SIGKILL)
    servers[0].process.wait()
    time.sleep(2.5)
    before = len(failed)
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert min(counts) > 5, counts
    assert "wrong" not in failed and len(failed) <= len(counts) and len(failed) == before, failed


def test_a_killed_server_loses_only_the_requests_it_was_computing(proxy: str, servers: list[Server]) -> None:
    kill_one(proxy, servers)


@pytest.mark.slow
def test_litellms_proxy_survives_the_loss_of_a_server(litellm_proxy: str, servers: list[Server]) -> None:
    whole = text_of(ask_chat(litellm_proxy, "hi"))
    assert text_of(ask_chat(servers[2].address, "hi")) == whole
    events = events_of(ask_chat(litellm_proxy, "hi", stream=True).text)
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1]) == whole
    refused = ask_chat(litellm_proxy, "x" * 5000)
    assert refused.status_code == 400 and "context" in json.dumps(refused.json())
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: ask_chat(litellm_proxy, f"number {number}"), range(24)))
    assert all(answers_of(server) > 0 for server in servers), "requests are spread over servers"
    kill_one(litellm_proxy, servers)


def test_litellms_router_survives_the_loss_of_a_server(
    servers: list[Server], clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # before the import: no network
    router_of = client_package("litellm").Router
    places = [{"model": "openai/tiny", "api_base": server.base, "api_key": "none"} for server in servers]
    deployments: list[Any] = [{"model_name": "tiny", "litellm_params": place} for place in places]
    # As in docs/fleet.md. Without allowed_fails=0 a router keeps asking a dead server: with three servers, one
    # request in 81 meets it four times in a row.
    router = router_of(model_list=deployments, num_retries=3, allowed_fails=0, cooldown_time=30)

    def say() -> str:
        done = router.completion(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
        return str(done.choices[0].message.content)

    texts = {say() for _ in range(6)}
    servers[1].process.kill()
    servers[1].process.wait()
    texts |= {say() for _ in range(9)}
    assert len(texts) == 1
