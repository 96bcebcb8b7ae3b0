"""Three servers on this machine behind HAProxy and behind LiteLLM's router, which share answers by Redis."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import ROOT, missing
from .served import Server, eventually, serving, with_template
from .test_redis_store import Server as RedisServer

CONFIGURATION = re.findall(
    r"^```haproxy\n(.*?)^```$", (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)[0]
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
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        missing("haproxy is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = CONFIGURATION.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for number, server in enumerate(servers, 1):
        text = text.replace(f"127.0.0.1:808{number}", server.address.removeprefix("http://"))
    (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
    process = subprocess.Popen([program, "-f", str(tmp_path / "haproxy.cfg"), "-db"], stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: _answers(address), 20)
        yield address
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health").status_code == 200
    return False


def answers_of(server: Server) -> int:
    """How many answers a server gave."""
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
    assert all(answers_of(server) > 1 for server in servers), "sessions are spread"


def test_a_server_that_is_killed_costs_only_what_was_in_flight(proxy: str, servers: list[Server]) -> None:
    expected = {f"Once {number}": ask(proxy, "warm", prompt=f"Once {number}").json()["choices"] for number in range(6)}
    failed: list[str] = []
    stop = threading.Event()

    def keep_asking(name: str) -> None:
        while not stop.is_set():
            for prompt, choices in expected.items():
                try:
                    answer = ask(proxy, name, prompt=prompt)
                    if answer.status_code != 200:
                        failed.append("in flight")
                    elif answer.json()["choices"] != choices:
                        failed.append("wrong")
                except httpx.HTTPError:
                    failed.append("in flight")

    threads = [threading.Thread(target=keep_asking, args=(f"client {number}",)) for number in range(4)]
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
    assert "wrong" not in failed and len(failed) <= 4 and len(failed) == before, failed


def test_litellms_router_goes_on_without_a_server(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # before the import: nothing from the network
    pytest.importorskip("litellm", reason='not installed: pip install "edgelm[clients]"')
    from litellm import Router

    places = [{"model": "openai/tiny", "api_base": server.base, "api_key": "none"} for server in servers]
    deployments: list[Any] = [{"model_name": "tiny", "litellm_params": place} for place in places]
    router = Router(model_list=deployments, num_retries=3, cooldown_time=30)

    def say() -> str:
        done = router.completion(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
        return str(done.choices[0].message.content)

    texts = {say() for _ in range(6)}
    servers[1].process.kill()
    servers[1].process.wait()
    texts |= {say() for _ in range(9)}
    assert len(texts) == 1
