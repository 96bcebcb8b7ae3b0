"""`edgelm serve` as a process: OpenAI's own client, start and shutdown, ports, sockets and keys."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edgelm.runtime import load
from edgelm.runtime.cli import main

from .served import START_S, Server, eventually, serving, with_template

KEY = "the-key"
ALL = "0.0.0.0"  # noqa: S104, must be refused without a key and served with one
HI: list[Any] = [{"role": "user", "content": "Say something."}]
NO_END = {"256": -1e6}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_bundle, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base, api_key="none", max_retries=0) as client:
        yield client


def test_the_server_prints_its_models_and_address(server: Server) -> None:
    text = "".join(server.lines)
    assert "serving tiny for this machine" in text
    assert f"{server.address}/v1" in text and "a page to chat with" in text and "curl" in text


def test_openais_client_gets_the_answer_of_generate(client: openai.OpenAI, bundle: Path) -> None:
    with load(bundle, threads=1, response_cache=False, prefix_cache=False) as engine:
        plain = engine.generate(messages=HI, max_tokens=30)
        drawn = engine.generate(messages=HI, max_tokens=30, temperature=0.8, seed=7, top_p=0.9)
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=30)
    assert answer.choices[0].message.content == plain.text
    assert answer.usage is not None and answer.usage.prompt_tokens == plain.stats.prompt_tokens
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_completion_tokens=30, temperature=0.8, seed=7, top_p=0.9
    )
    assert answer.choices[0].message.content == drawn.text


def test_openais_client_streams(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    text, usage = "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and usage.completion_tokens == 20
    with client.chat.completions.stream(**asked) as stream, pytest.raises(openai.LengthFinishReasonError) as cut:
        stream.get_final_completion()
    assert cut.value.completion.choices[0].message.content == text


def test_openais_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])


def test_openais_client_completes_lists_and_counts(client: openai.OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt="Once", max_tokens=5, logprobs=2)
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.tokens is not None
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 512


def test_openais_client_gets_json(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=HI, response_format=form, max_tokens=50)
    assert json.loads(answer.choices[0].message.content or "") in ({"n": 1}, {"n": 2})


def test_a_stream_that_is_closed_ends_the_answer(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=400, logit_bias={"256": -100}, stream=True
    )
    next(iter(stream))
    stream.close()
    figures = f"{server.address}/metrics"
    assert eventually(lambda: 'requests_processing{model="tiny"} 0' in httpx.get(figures).text)


def test_shutdown_lets_current_answers_finish(bundle: Path) -> None:
    body = {"messages": HI, "max_tokens": 400, "logit_bias": NO_END, "n": 4, "stream": True}
    with (
        serving(bundle, "--no-response-cache") as server,
        httpx.stream("POST", f"{server.base}/chat/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        text = "\n".join([first, *lines])
        assert text.count('"finish_reason":"length"') == 4 and text.rstrip().endswith("data: [DONE]")
        assert server.process.wait(30) == 0


def test_shutdown_does_not_wait_forever(bundle: Path) -> None:
    body = {"messages": HI, "max_tokens": 450, "logit_bias": NO_END, "n": 8, "stream": True, "temperature": 1}
    with serving(bundle, "--drain", "1") as server, httpx.Client(timeout=60) as client:
        bodies = [{**body, "seed": number} for number in range(40)]
        streams = [
            client.send(client.build_request("POST", f"{server.base}/chat/completions", json=item), stream=True)
            for item in bodies
        ]
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 10
        for stream in streams:
            stream.close()


def test_an_interrupted_server_ends_with_one_line_at_most(bundle: Path) -> None:
    with serving(bundle) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "http", "9" * 40])
def test_an_invalid_port_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(bundle), f"--port={port}"])
    assert ended.value.code == 2
    assert "give a number from 0 to 65535" in capsys.readouterr().err


def test_two_servers_on_one_port(server: Server, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.address.rsplit(":", 1)[1]
    assert main(["serve", str(bundle), "--port", port]) == 1
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_a_unix_socket(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with serving(bundle, "--unix", path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert main(["serve", str(bundle), "--unix", str(path)]) == 1
        assert "another program listens" in capsys.readouterr().err
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert not path.exists()
    path.write_text("not a socket")
    assert main(["serve", str(bundle), "--unix", str(path)]) == 1
    assert path.read_text() == "not a socket"


def test_other_machines_are_served_only_with_a_key(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(bundle), "--host", ALL, "--port", "0"]) == 1
    assert "--api-key-file" in capsys.readouterr().err
    key = tmp_path / "key"
    key.write_text(f"# keys\n{KEY}\n")
    key.chmod(0o644)
    assert main(["serve", str(bundle), "--host", ALL, "--api-key-file", str(key)]) == 1
    assert "chmod 600" in capsys.readouterr().err
    key.chmod(0o600)
    with serving(bundle, "--host", ALL, "--api-key-file", key) as server:
        assert "with a key" in "".join(server.lines)
        with openai.OpenAI(base_url=server.base, api_key=KEY, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
        with (
            openai.OpenAI(base_url=server.base, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="wrong"),
        ):
            client.models.list()


@pytest.mark.parametrize("content", ["", "# nothing\n\n", "two words\n", "\xff"])
def test_key_files_without_a_key_are_refused(bundle: Path, tmp_path: Path, content: str) -> None:
    key = tmp_path / "key"
    key.write_bytes(content.encode("latin-1"))
    key.chmod(0o600)
    assert main(["serve", str(bundle), "--api-key-file", str(key)]) == 1


def test_a_bundle_that_cannot_be_loaded_ends_the_server(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "tokenizer.json").write_bytes(b"x" * (broken / "tokenizer.json").stat().st_size)
    with serving(broken, wait=False) as server:
        assert server.process.wait(START_S) == 1
    text = "".join(server.lines)
    assert "edgelm: error:" in text and "Traceback" not in text
    assert main(["serve", str(tmp_path / "nothing")]) == 1


def test_names_of_bundles(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        shutil.copytree(bundle, tmp_path / "many" / name)
    with serving(tmp_path / "many", f"third={bundle}") as server:
        names = [entry["id"] for entry in httpx.get(f"{server.base}/models").json()["data"]]
        assert names == ["one", "two", "third"]
        body = {"prompt": "Once", "max_tokens": 3, "model": "third"}
        assert httpx.post(f"{server.base}/completions", json=body, timeout=30).json()["model"] == "third"
    assert main(["serve", str(bundle), f"tiny={bundle}"]) == 1
    assert "two bundles are called 'tiny'" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from edgelm.runtime.cli import main\n"
        f"sys.exit(main(['serve', {str(Path(__file__).parent)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and 'pip install "edgelm[serve]"' in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_disables_caches_and_loses_no_answer(bundle: Path, tmp_path: Path) -> None:
    """No file may grow, as on a full disk."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "from edgelm.runtime.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    home = {"EDGELM_HOME": str(tmp_path / "home")}
    with serving(bundle, environment=home, program=code) as server:
        body = {"messages": HI, "max_tokens": 10}
        first, second = (httpx.post(f"{server.base}/chat/completions", json=body, timeout=60) for _ in range(2))
        assert first.status_code == second.status_code == 200
        assert first.json()["choices"] == second.json()["choices"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert "Traceback" not in "".join(server.lines)
