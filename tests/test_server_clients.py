"""Third-party clients against the server: LiteLLM, LangChain, the program llm, OpenAI's client for Node.

The Python clients are the extra `clients`, which scripts/setup_clients installs into build/clients.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Engine

from .conftest import ROOT, missing
from .served import CLIENTS, client_package, eventually, listening, saying_engine, session_of
from .test_tool_calls import ONE, RIGHT, TOOLS

pytestmark = pytest.mark.usefixtures("clients")
HI = [{"role": "user", "content": "hi"}]
WEATHER = [{"role": "user", "content": "weather?"}]
LONG = [{"role": "user", "content": "long"}]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [5]}}, "required": ["n"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
TOO_LONG = [{"role": "user", "content": "x" * 5000}]


def answer(prompt: str) -> str:
    """The answers of these tests' model."""
    last = prompt.rsplit("<user>", 1)[-1]
    if "tool_response" in last:
        return "It is sunny."
    return ONE["tagged"] if "weather?" in last else "z" * 1200 if "long" in last else "Hello there"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    with saying_engine(tmp_path_factory.mktemp("clients"), answer) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with listening({"fake": engine}) as address:
        yield address


@pytest.fixture
def slow(engine: Engine) -> Iterator[Engine]:
    session_of(engine).pause_s = 0.02
    yield engine
    session_of(engine).pause_s = 0.0


def stops(engine: Engine) -> bool:
    """Return whether computing stops long before the answer would be complete."""
    session = session_of(engine)

    def still() -> bool:
        before = session.steps_done
        time.sleep(0.15)
        return session.steps_done == before

    return eventually(still, 5) and len(session.tokens) < 1000


# ---- LiteLLM


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no network
    return client_package("litellm")


def test_litellm(litellm: Any, address: str, slow: Engine) -> None:
    place = {"model": "openai/fake", "api_base": f"{address}/v1", "api_key": "none", "num_retries": 0}
    session_of(slow).pause_s = 0.0
    done = litellm.completion(**place, messages=HI)
    assert done.choices[0].message.content == "Hello there" and done.usage.completion_tokens == 11
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**place, messages=HI, stream=True)]
    assert "".join(parts) == "Hello there"
    called = litellm.completion(**place, messages=WEATHER, tools=TOOLS).choices[0]
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.message.tool_calls[0].function.arguments) == json.loads(RIGHT)
    formed = litellm.completion(**place, messages=HI, response_format=FORM, max_tokens=200)
    assert json.loads(formed.choices[0].message.content) == {"n": 5}
    with pytest.raises(litellm.ContextWindowExceededError, match="context"):
        litellm.completion(**place, messages=TOO_LONG)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**place, "model": "openai/other"}, messages=HI)
    session_of(slow).pause_s = 0.02
    stream = litellm.completion(**place, messages=LONG, stream=True)
    next(iter(stream))
    stream.completion_stream.close()
    assert stops(slow)


# ---- LangChain


def test_langchain(address: str, slow: Engine) -> None:
    import openai

    session_of(slow).pause_s = 0.0
    model = client_package("langchain_openai").ChatOpenAI(
        model="fake", base_url=f"{address}/v1", api_key="none", max_retries=0
    )
    done = model.invoke("hi")
    assert done.content == "Hello there" and done.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in model.stream("hi")) == "Hello there"
    called = model.bind_tools(TOOLS).invoke("weather?")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", json.loads(RIGHT))]
    history = ["weather?", called, {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "sunny"}]
    assert model.bind_tools(TOOLS).invoke(history).content == "It is sunny."
    formed = model.with_structured_output({"title": "n", **SCHEMA}, method="json_schema").invoke("hi", max_tokens=200)
    assert formed == {"n": 5}
    with pytest.raises(openai.BadRequestError, match="context"):
        model.invoke("x" * 5000)
    session_of(slow).pause_s = 0.02
    stream = model.stream("long")
    next(stream)
    stream.close()
    assert stops(slow)


# ---- llm


class Llm:
    """The program llm, which knows the server's model as `local`."""

    def __init__(self, address: str, folder: Path) -> None:
        client_package("llm")
        (folder / "extra-openai-models.yaml").write_text(
            f"- model_id: local\n  model_name: fake\n  api_base: {address}/v1\n  supports_tools: true\n"
            "  supports_schema: true\n",
            encoding="utf-8",
        )
        settings = {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none", "PYTHONUNBUFFERED": "1"}
        self.environment = {**os.environ, **settings, "PYTHONPATH": str(CLIENTS)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "llm", "-m", "local", *words]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=self.environment)

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit status, output and errors."""
        with self.start(*words) as process:
            output, errors = process.communicate("", timeout=60)
        return process.returncode, output.strip(), errors


def test_the_program_llm(address: str, engine: Engine, tmp_path: Path) -> None:
    llm = Llm(address, tmp_path)
    assert llm.run("hi") == (0, "Hello there", "")
    assert llm.run("hi", "--no-stream") == (0, "Hello there", "")
    _, formed, errors = llm.run("hi", "--schema", json.dumps(SCHEMA), "--no-stream")
    assert json.loads(formed) == {"n": 5}, errors
    functions = "def weather(city: str) -> str:\n    return 'sunny in ' + city\n"
    _, called, errors = llm.run("weather?", "--functions", functions)
    assert called == "It is sunny.", errors
    status, _, errors = llm.run("x" * 5000)
    assert status == 1 and "context" in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_the_program_llm_is_interrupted(address: str, slow: Engine, tmp_path: Path) -> None:
    with Llm(address, tmp_path).start("long") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.stdout.read(5) == "zzzzz"
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert stops(slow)
        assert session_of(slow).steps_done > 5


# ---- Node


def test_openais_client_for_node(address: str, slow: Engine) -> None:
    modules = ROOT / "build" / "node" / "node_modules"
    node = shutil.which("node")
    if node is None or not (modules / "openai").is_dir():
        missing("Node or its packages are not installed: run  scripts/setup_node")
    script = modules.parent / "client.mjs"
    shutil.copy(ROOT / "tests" / "node" / "client.mjs", script)
    session_of(slow).pause_s = 0.002
    done = subprocess.run(
        [node, str(script), f"{address}/v1"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == 7, done.stdout
    assert stops(slow)
