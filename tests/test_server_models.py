"""Several bundles of one server: loaded on request, unloaded for others, replaced, deleted."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm.runtime import Engine, load
from edgelm.runtime.errors import BundleCorruptError, EngineClosedError, SettingsError
from edgelm.runtime.server import ServerSettings, app
from edgelm.runtime.server.models import _size

from .served import START_S, context_of, eventually, saying_engine, with_template

TEXT = "/v1/completions"


class Opener:
    """Opens engines that answer with their folder's name, and records its calls. pause_s: duration of opening."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.opened: list[str] = []
        self.fail = False

    def __call__(self, path: Path) -> Engine:
        time.sleep(self.pause_s)
        self.opened.append(path.name)
        if self.fail:
            raise BundleCorruptError(f"{path} is broken")
        return saying_engine(path, f"I am {path.name}", pause_s=0.001)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Three folders of a megabyte each, laid out like another exporter's."""
    found = {}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"x" * 1_000_000)
        found[name] = tmp_path / name
    return found


@pytest.fixture
def client_with(folders: dict[str, Path]) -> Iterator[Callable[..., TestClient]]:
    opened: list[TestClient] = []

    def make(opener: Opener, **settings: object) -> TestClient:
        application = app(folders, ServerSettings(**settings), open_engine=opener)  # type: ignore[arg-type]
        client = TestClient(application, base_url="http://localhost", raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__()


def said(client: TestClient, name: str, tokens: int = 50) -> str:
    answer = client.post(TEXT, json={"prompt": "a", "model": name, "max_tokens": tokens})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def loaded(client: TestClient) -> list[str]:
    return [entry["id"] for entry in client.get("/v1/models").json()["data"] if entry["loaded"]]


def ready(client: TestClient) -> None:
    assert eventually(lambda: client.get("/health").status_code == 200, START_S)


def test_bundles_are_loaded_when_they_are_asked_for(client_with: Callable[..., TestClient]) -> None:
    opener = Opener()
    client = client_with(opener)
    ready(client)
    assert opener.opened == ["one"]
    assert said(client, "two") == "I am two" and said(client, "two") == "I am two"
    assert opener.opened == ["one", "two"] and loaded(client) == ["one", "two"]
    assert client.post(TEXT, json={"prompt": "a"}).json()["model"] == "one"


def test_the_least_recently_used_model_is_unloaded(client_with: Callable[..., TestClient]) -> None:
    opener = Opener()
    client = client_with(opener, memory_bytes=2_500_000)
    ready(client)
    said(client, "two")
    said(client, "one")
    said(client, "three")
    assert loaded(client) == ["one", "three"]
    said(client, "two")
    assert loaded(client) == ["two", "three"]
    assert opener.opened == ["one", "two", "three", "two"]
    assert client.get("/health").status_code == 200


def test_a_model_in_use_is_not_dropped(client_with: Callable[..., TestClient]) -> None:
    client = client_with(Opener(), memory_bytes=1_500_000)
    ready(client)
    with ThreadPoolExecutor(8) as pool:
        names = ["one", "two", "three"] * 6
        assert list(pool.map(lambda name: said(client, name), names)) == [f"I am {name}" for name in names]
    assert len(loaded(client)) == 1


def test_a_model_larger_than_the_budget_is_refused(
    client_with: Callable[..., TestClient], folders: dict[str, Path]
) -> None:
    (folders["two"] / "model.onnx").write_bytes(b"x" * 3_000_000)
    client = client_with(Opener(), memory_bytes=2_000_000)
    ready(client)
    answer = client.post(TEXT, json={"prompt": "a", "model": "two"})
    assert answer.status_code == 503 and "--memory" in answer.json()["error"]["message"]
    assert said(client, "one") == "I am one"


def test_while_the_first_model_loads_the_server_says_so(client_with: Callable[..., TestClient]) -> None:
    client = client_with(Opener(pause_s=0.5))
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "model_loading"
    answer = client.post(TEXT, json={"prompt": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable_error"
    ready(client)
    assert said(client, "one") == "I am one"


def test_requests_for_one_model_load_it_once(client_with: Callable[..., TestClient]) -> None:
    opener = Opener(pause_s=0.1)
    client = client_with(opener)
    ready(client)
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda _: said(client, "two"), range(6))) == {"I am two"}
    assert opener.opened == ["one", "two"]


def test_a_model_that_fails_to_load_is_an_error_and_may_load_later(
    client_with: Callable[..., TestClient], folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    opener = Opener()
    client = client_with(opener)
    ready(client)
    opener.fail = True
    answer = client.post(TEXT, json={"prompt": "a", "model": "two"})
    assert answer.status_code == 500 and "cannot be loaded" in answer.json()["error"]["message"]
    assert str(folders["two"]) not in answer.text and str(folders["two"]) in caplog.text
    opener.fail = False
    assert said(client, "two") == "I am two"


def test_a_bundle_replaced_or_deleted_while_it_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_bundle, folder)
    application = app({"tiny": folder, "other": tiny_bundle}, ServerSettings(memory_bytes=_size(tiny_bundle) + 1000))
    with TestClient(application, base_url="http://localhost") as client:
        ready(client)
        text = said(client, "tiny", 12)
        shutil.rmtree(folder)
        assert said(client, "tiny", 12) == text
        said(client, "other", 3)
        assert loaded(client) == ["other"]
        answer = client.post(TEXT, json={"prompt": "a", "model": "tiny"})
        assert answer.status_code == 404 and "gone" in answer.json()["error"]["message"]
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["tiny", "other"]
        shutil.copytree(tiny_bundle, folder)
        assert said(client, "tiny", 12) == text


def test_a_replaced_bundle_is_loaded_once_the_old_one_is_unloaded(tiny_bundle: Path, tmp_path: Path) -> None:
    """A loaded bundle stays unchanged, whatever happens to its files."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_bundle, folder)
    application = app({"tiny": folder, "other": tiny_bundle}, ServerSettings(memory_bytes=3 * _size(tiny_bundle) // 2))
    with TestClient(application, base_url="http://localhost") as client:
        ready(client)
        text = said(client, "tiny", 12)

        def entry() -> dict[str, Any]:
            found: dict[str, Any] = client.get("/v1/models/tiny").json()
            return found

        first = entry()
        shutil.rmtree(folder)
        with_template(tiny_bundle, folder)
        assert entry() == first and said(client, "tiny", 12) == text
        said(client, "other", 3)
        assert loaded(client) == ["other"]
        assert said(client, "tiny", 12) == text and loaded(client) == ["tiny"]
        assert entry()["chat"] and entry()["digest"] != first["digest"] and not first["chat"]
        # Half of a copy, as if another program were writing it.
        said(client, "other", 4)
        (folder / "model.onnx").write_bytes(b"half")
        answer = client.post(TEXT, json={"prompt": "a", "model": "tiny"})
        assert answer.status_code == 500 and "cannot be loaded" in answer.json()["error"]["message"]
        assert said(client, "other", 5)


def test_the_size_estimate_covers_the_weights_and_a_texts_cache(tiny_bundle: Path) -> None:
    with load(tiny_bundle, threads=1) as engine:
        weights = engine.bundle.manifest.files["model.onnx.data"].bytes
    assert weights < _size(tiny_bundle) < 3 * weights + 1_000_000


def test_engines_passed_by_the_caller_stay_open(tmp_path: Path) -> None:
    with saying_engine(tmp_path, "still here") as engine:
        with TestClient(app({"mine": engine}), base_url="http://localhost") as client:
            assert said(client, "mine") == "still here"
            assert context_of(client).models.ready
        assert engine.generate("a", max_tokens=50).text == "still here"


def test_a_model_is_loaded_without_a_lifespan(folders: dict[str, Path]) -> None:
    """As when the application is mounted into another one, which does not run its lifespan."""
    client = TestClient(app(folders, open_engine=Opener()), base_url="http://localhost")
    assert said(client, "one") == "I am one"


def test_shutdown_unloads_models_and_ends_threads(
    client_with: Callable[..., TestClient], folders: dict[str, Path]
) -> None:
    before = threading.active_count()
    engines: list[Engine] = []

    def remember(path: Path) -> Engine:
        engines.append(Opener()(path))
        return engines[-1]

    with TestClient(app(folders, open_engine=remember), base_url="http://localhost") as client:
        ready(client)
        said(client, "two")
    assert len(engines) == 2
    for engine in engines:
        with pytest.raises(EngineClosedError):
            engine.generate("a")
    assert eventually(lambda: threading.active_count() <= before, 20)


def test_a_server_without_bundles_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one bundle"):
        app({})
