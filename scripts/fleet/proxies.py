"""HAProxy and LiteLLM's proxy before servers on this machine, configured as in docs/fleet.md."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# LiteLLM's proxy requires a key; this one is valid only in this process.
MASTER_KEY = f"sk-{secrets.token_hex(16)}"
_ROOT = Path(__file__).resolve().parents[2]
_START_S = 240.0  # LiteLLM starts slowly on a busy machine


@dataclass(frozen=True)
class Proxy:
    """A kind of proxy. language: of its block in the document; health: the path of its health check."""

    program: str
    language: str
    health: str


HAPROXY = Proxy("haproxy", "haproxy", "/health")
LITELLM = Proxy("litellm", "yaml", "/health/liveliness")


def find(proxy: Proxy) -> str | None:
    """The installed program; LiteLLM has an environment of its own, as docs/fleet.md installs it."""
    own = _ROOT / "build" / proxy.program / "bin" / proxy.program
    return str(own) if own.is_file() else shutil.which(proxy.program, path=f"{os.environ['PATH']}:/usr/sbin")


def configuration(proxy: Proxy, addresses: Sequence[str], port: int, model: str) -> str:
    """The document's block with these addresses (http://...), this port and this model's name."""
    document = (_ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
    text: str = re.findall(rf"^```{proxy.language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)[0]
    for number, address in enumerate(addresses, 1):
        assert f"127.0.0.1:808{number}" in text, "the document has three boards"
        text = text.replace(f"127.0.0.1:808{number}", address.removeprefix("http://"))
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("tales", model)


@contextlib.contextmanager
def running(proxy: Proxy, addresses: Sequence[str], model: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run a proxy before servers; yields its address and process once it answers. Raises: RuntimeError with its log."""
    program, port, path = find(proxy), _free_port(), folder / f"{proxy.program}.conf"
    assert program is not None, f"{proxy.program} is not installed"
    path.write_text(configuration(proxy, addresses, port, model), encoding="utf-8")
    words = ["-f", str(path), "-db"]
    if proxy is LITELLM:
        words = ["--config", str(path), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    # Otherwise LiteLLM downloads prices of models.
    settings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": MASTER_KEY, "KEY": "none"}
    environment = {**os.environ, **settings}
    environment.pop("PYTHONPATH", None)
    log = folder / f"{proxy.program}.log"
    with log.open("wb") as file:
        process = subprocess.Popen([program, *words], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, address + proxy.health, log)
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310, our own address
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
