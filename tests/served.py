"""Shared by the server's tests: engines with scripted answers, clients of an application in this process, servers in
processes of their own, and third-party clients."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.testclient import TestClient

from edgelm.runtime import Bundle, Engine
from edgelm.runtime.bundle.folder import file_digest
from edgelm.runtime.bundle.manifest import FileEntry
from edgelm.runtime.caches.responses.cache import ResponseCache
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.server import ServerSettings, app
from edgelm.runtime.server.running import Listening, bind, make_server
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import ROOT, byte_tokenizer, missing
from .test_decode import END, manifest

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
JSON = {"Content-Type": "application/json"}
Answering = Callable[[str], str]
START_S = 60.0
CLIENTS = ROOT / "build" / "clients"  # where scripts/setup_clients puts third-party clients


class SayingSession(FakeSession):
    """Answers each prompt with a function of its text. pause_s: duration of a step; `steps_done` counts steps."""

    def __init__(self, answer: Answering, pause_s: float = 0.0) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.steps_done = 0
        self.prompt_length = 0
        self._texts: dict[bytes, bytes] = {}
        super().__init__(END + 1, self._next)

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        time.sleep(self.pause_s)
        self.steps_done += 1
        return super().step(token_ids, keep)

    def _next(self, tokens: Sequence[int]) -> int:
        known = bytes(token for token in tokens if token < END)
        for prompt, whole in self._texts.items():
            if known.startswith(prompt) and whole.startswith(known):
                return whole[len(known)] if len(known) < len(whole) else END
        answer = self.answer(known.decode("utf-8", "replace")).encode()
        self._texts[known] = known + answer
        return answer[0] if answer else END


def byte_folder(folder: Path) -> Path:
    """Write a byte tokenizer whose ids are the byte values."""
    byte_tokenizer(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] = {character: byte for byte, character in enumerate(_alphabet())}
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def _alphabet() -> list[str]:
    from edgelm.runtime.text.tokenizer import _byte_level_alphabet

    return [character for character, _ in sorted(_byte_level_alphabet().items(), key=lambda pair: pair[1])]


def saying_engine(
    folder: Path,
    answer: Answering | str = "Hello there",
    *,
    template: str | None = CHAT,
    context: int = 2000,
    pause_s: float = 0.0,
    cache: bool = False,
) -> Engine:
    """An engine with a byte tokenizer. answer: its answer, or a function of the prompt's text."""
    byte_folder(folder)
    files = {"tokenizer.json": FileEntry((folder / "tokenizer.json").stat().st_size, "")}
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        files["chat_template.jinja"] = FileEntry(len(template.encode()), "")
    say = answer if callable(answer) else lambda _: answer
    session = SayingSession(say, pause_s)
    bundle = Bundle(folder, manifest(context_length=context, files=files))
    responses = ResponseCache() if cache else None
    return Engine(bundle, session, Tokenizer(folder / "tokenizer.json"), responses)


def session_of(engine: Engine) -> SayingSession:
    """The session behind an engine of `saying_engine`."""
    session = engine._session
    assert isinstance(session, SayingSession)
    return session


@contextlib.contextmanager
def client_of(bundles: Any, **settings: Any) -> Iterator[TestClient]:
    """A client of an application in this process."""
    application = app(bundles, ServerSettings(**settings))
    with TestClient(application, base_url="http://localhost") as client:
        yield client


def context_of(client: TestClient) -> Any:
    """The application's context."""
    application = client.app
    assert isinstance(application, Starlette)
    return application.state.edgelm


def chat(client: httpx.Client, content: str = "hi", **fields: Any) -> httpx.Response:
    """Ask for an answer to one message."""
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body)


def events_of(text: str) -> list[Any]:
    """The data of a stream's events; comments as plain strings."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if block.startswith(":"):
            found.append(block)
        elif block:
            data = next(line.removeprefix("data: ") for line in lines if line.startswith("data: "))
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@contextlib.contextmanager
def listening(bundles: Any, **settings: Any) -> Iterator[str]:
    """Run an application of this process on a port, in a thread of its own; yields its address."""
    listener = bind(Listening(port=0))
    server = make_server(app(bundles, ServerSettings(**settings)), 1.0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class Server:
    """`edgelm serve` as a process."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str], address: str) -> None:
        self.process = process
        self.lines = lines
        self.address = address

    @property
    def base(self) -> str:
        """The base_url for OpenAI's clients."""
        return f"{self.address}/v1"


@contextlib.contextmanager
def serving(
    *words: str | Path,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
    program: str = "import sys; from edgelm.runtime.cli import main; sys.exit(main(sys.argv[1:]))",
) -> Iterator[Server]:
    """Run `edgelm serve` on a free local port until the block ends. program: Python code that runs the command."""
    where = [] if {"--unix", "--port"} & set(map(str, words)) else ["--port", "0"]
    command = [sys.executable, "-c", program, "serve", *map(str, words), *where, "--threads", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        address = _address(process, lines) if wait else ""
        yield Server(process, lines, address)
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):
        lines.extend(iter(process.stdout.readline, ""))


def _address(process: subprocess.Popen[str], lines: list[str]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for line in list(lines):
            found = re.search(r"interface at (\S+)/v1|on the socket (\S+)", line)
            if found:
                return found[1] or found[2]
        assert process.poll() is None, "".join(lines)
        time.sleep(0.02)
    raise AssertionError("".join(lines))


def eventually(fulfilled: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return whether the condition becomes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not fulfilled():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def with_template(bundle: Path, folder: Path, template: str = CHAT) -> Path:
    """A copy of a bundle with a chat template."""
    shutil.copytree(bundle, folder)
    path = folder / "chat_template.jinja"
    path.write_text(template, encoding="utf-8")
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def client_package(name: str) -> Any:
    """A third-party client package; calls `missing` if it is not installed. Use with the fixture `clients`."""
    if importlib.util.find_spec(name) is None:
        missing(f"{name} is not installed: run  scripts/setup_clients")
    return importlib.import_module(name)
