"""scripts/serve_on_ray.py with Ray itself: replicas answer as `generate` does, and a killed one is restarted."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from edgelm.runtime import load
from edgelm.runtime.server import ServerSettings

from .conftest import ROOT
from .served import events_of, eventually, with_template

pytestmark = pytest.mark.slow
REPLICAS = 2
BODY = {"prompt": "Once upon", "max_tokens": 20}
KEY = "the-key"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_bundle, tmp_path_factory.mktemp("ray") / "tiny")


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    """Two replicas behind Ray's own proxy."""
    ray = pytest.importorskip("ray", reason='not installed: pip install "edgelm[cluster]"')
    script = pytest.importorskip("scripts.serve_on_ray", reason="scripts/ is missing")
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(script.deployment({"tiny": bundle}, ServerSettings(api_keys=(KEY,)), replicas=REPLICAS))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(address: str, **changes: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{address}/v1/completions", json={**BODY, **changes}, headers=headers, timeout=60)


def pids() -> set[int]:
    """The processes of the live replicas."""
    found = psutil.process_iter(["pid", "cmdline", "status"])
    return {
        process.info["pid"]
        for process in found
        if (process.info["cmdline"] or [""])[0].startswith("ray::ServeReplica") and process.info["status"] != "zombie"
    }


def test_replicas_answer_as_generate(address: str, bundle: Path) -> None:
    with load(bundle, threads=1, response_cache=False, prefix_cache=False) as engine:
        texts = {prompt: engine.generate(prompt, max_tokens=20).text for prompt in ("Once upon", "A cat", "The sea")}
    with ThreadPoolExecutor(6) as pool:
        prompts = list(texts) * 6
        answers = list(pool.map(lambda prompt: ask(address, prompt=prompt), prompts))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [texts[prompt] for prompt in prompts]


def test_streams_errors_and_keys_come_through(address: str) -> None:
    whole = ask(address).json()["choices"][0]["text"]
    events = events_of(ask(address, stream=True).text)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole and events[-1] == "[DONE]"
    assert ask(address, prompt=5).status_code == 400
    assert httpx.post(f"{address}/v1/completions", json=BODY, timeout=60).status_code == 401
    assert ask(address, model="other").status_code == 404


def test_a_client_that_leaves_frees_its_row(address: str) -> None:
    body = {"prompt": "a", "max_tokens": 450, "logit_bias": {"256": -100}, "stream": True, "n": 8, "temperature": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(4):
        with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            next(answer.iter_lines())

    def idle() -> bool:
        texts = [httpx.get(f"{address}/metrics", headers=headers, timeout=60).text for _ in range(6)]
        return all('requests_processing{model="tiny"} 0' in text for text in texts)

    assert eventually(idle, 20)


def test_a_killed_replica_is_restarted(address: str) -> None:
    before = pids()
    assert len(before) == REPLICAS
    killed = min(before)
    os.kill(killed, 9)
    statuses = [ask(address, seed=number, temperature=1).status_code for number in range(20)]
    assert statuses.count(200) >= 18, statuses
    assert eventually(lambda: len(pids() - {killed}) == REPLICAS, 60)
    assert ask(address).status_code == 200
