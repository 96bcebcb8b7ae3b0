"""docs/server.md is correct: its programs run against a server, and its options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edgelm.runtime.commands import serve
from edgelm.runtime.server.openapi import description

from .conftest import ROOT
from .served import listening, saying_engine

DOCUMENT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
CLIENTS = [block for block in PYTHON if "import OpenAI" in block]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (
        saying_engine(tmp_path_factory.mktemp("tales"), " there was a lake.") as tales,
        saying_engine(tmp_path_factory.mktemp("chat"), "A lake is water.") as chat,
        listening({"tales": tales, "chat": chat}) as address,
    ):
        yield address


@pytest.mark.parametrize("number", range(len(CLIENTS)))
def test_programs_of_clients_run(number: int, address: str) -> None:
    code = CLIENTS[number].replace("http://127.0.0.1:8080", address)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_program_that_mounts_the_application(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tales").symlink_to(tiny_bundle)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        names: dict[str, object] = {}
        exec(next(block for block in PYTHON if "Mount" in block), names)  # noqa: S102, our own document's program
        with TestClient(names["program"], base_url="http://localhost") as client:  # type: ignore[arg-type]
            assert client.get("/").text == "my program"
            for _ in range(500):
                if client.get("/llm/health").status_code == 200:
                    break
            body = {"prompt": "Once", "max_tokens": 3}
            assert client.post("/llm/v1/completions", json=body).json()["model"] == "tales"
            assert "<title>edgelm" in client.get("/llm/").text
            assert client.get("/llm/v1/nothing").status_code == 404
    finally:
        os.chdir(before)


def test_every_endpoint_is_described() -> None:
    for path in description()["paths"]:
        assert path.replace("{name}", "NAME") in DOCUMENT, path


def test_every_option_of_the_document_exists() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    for option in set(re.findall(r"--[a-z][a-z-]+", DOCUMENT)):
        assert option in parser.format_help(), option
