"""The chat page in headless Chromium; needs Chromium, Node and playwright-core (scripts/setup_node)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.runtime import Engine

from .conftest import ROOT, missing
from .served import client_of, listening, saying_engine

MODULES = ROOT / "build" / "node" / "node_modules"
KEY = "open-sesame"
LIMIT_S = 240
MARKDOWN = (
    "# Title\n\nSome **bold** and `inline` and [a link](https://example.org/x) and [none](javascript:alert(1)).\n\n"
    "- one\n- two\n\n```python\nprint(1)\nprint(2)\n```\n\n<img src=x onerror=alert(1)><script>alert(2)</script>"
)


def answer(prompt: str) -> str:
    """The answers of these tests' model."""
    last = prompt.rsplit("<user>", 1)[-1]
    if "markdown" in last:
        return MARKDOWN
    if "long" in last:
        return "word " * 180
    if "system?" in last:
        return prompt.removeprefix("<system>").split("\n")[0] if prompt.startswith("<system>") else "none"
    asked = sum(turn.split("\n")[0].count("count") for turn in prompt.split("<user>")[1:])
    return f"{asked} so far" if "count" in last else "Hello there."


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with saying_engine(tmp_path_factory.mktemp("page"), answer, pause_s=0.004) as engine:
        yield engine


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if shutil.which("node") is None or not (MODULES / "playwright-core").is_dir():
        missing("Node or playwright-core is not installed: run  scripts/setup_node")
    if found is None:
        missing("Chromium is not installed")
    return found


def drive(address: str, browser: str, folder: Path, *more: str) -> str:
    """Run the checks in the browser; returns their output."""
    script = MODULES.parent / "page.mjs"
    shutil.copy(ROOT / "tests" / "node" / "page.mjs", script)
    command = ["node", str(script), address, browser, str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_person_can_use_the_page(engine: Engine, browser: str, tmp_path: Path) -> None:
    shots = Path(os.environ.get("EDGELM_SCREENSHOTS", tmp_path))
    with (
        saying_engine(tmp_path, " a time.", template=None) as base,
        listening({"fake": engine, "base": base}) as address,
    ):
        said = drive(address, browser, shots)
    assert said.count("ok: ") == 12, said
    assert all((shots / f"{name}.png").stat().st_size > 5_000 for name in ("answer-light", "answer-dark", "phone"))


def test_a_key_is_asked_for(engine: Engine, browser: str, tmp_path: Path) -> None:
    with listening({"fake": engine}, api_keys=(KEY,)) as address:
        assert drive(address, browser, tmp_path, KEY).count("ok: ") == 1


def test_the_page_is_one_file_without_external_references(engine: Engine) -> None:
    with client_of(engine) as client:
        found = client.get("/")
    assert found.headers["content-type"].startswith("text/html")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", found.text)
    assert not re.findall(r"https?://(?!www\.w3\.org)", found.text.replace("https?:", ""))
    assert "innerHTML" not in found.text and " style=" not in found.text
    assert len(found.content) < 60_000


def test_a_server_may_have_no_page(engine: Engine) -> None:
    with client_of(engine, page=False) as client:
        assert client.get("/").status_code == 404
