"""Answers on a real Redis server; each test module starts one in a folder of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import load
from edgelm.runtime.caches.responses.answers import CachedAnswer, encode_answer
from edgelm.runtime.caches.responses.cache import ResponseCache, ResponseCacheSettings
from edgelm.runtime.caches.responses.redis_store import RedisStore
from edgelm.runtime.errors import CacheCorruptError, CacheError, MissingExtraError, SettingsError

from .conftest import ROOT, missing

redis = pytest.importorskip("redis", reason="redis-py is not installed")
PREFIX = "edgelm:response:1:"


def answer(number: int) -> CachedAnswer:
    return CachedAnswer(((f"w{number} é", (number,)), ("", ())), "length")


class Server:
    """A Redis server on a socket that can be stopped and restarted."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self.process = subprocess.Popen(
            [*command, "--dir", str(self.socket.parent)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while not self.socket.exists():
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.socket.unlink(missing_ok=True)
            self.process = None


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        missing("redis-server is not installed")
    server = Server(tmp_path_factory.mktemp("r"))
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Server:
    if running.process is None:
        running.start()
    redis.Redis.from_url(running.url).flushall()
    return running


@pytest.fixture
def client(server: Server) -> Any:
    return redis.Redis.from_url(server.url)


def test_machines_share_answers(server: Server) -> None:
    one, other = RedisStore(server.url), RedisStore(server.url)
    assert one.get("key") is None
    one.put("key", answer(1))
    assert other.get("key") == answer(1)
    other.put("key", answer(2))
    assert one.get("key") == answer(2)
    one.check()
    one.close()
    assert one.get("key") == answer(2)


def test_an_answer_lives_for_its_time(server: Server, client: Any) -> None:
    store = RedisStore(server.url, ttl_s=0.05)
    store.put("key", answer(1))
    assert 0 < client.pttl(PREFIX + "key") <= 50
    end = time.monotonic() + 30
    while client.exists(PREFIX + "key"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert store.get("key") is None
    RedisStore(server.url).put("key", answer(1))
    assert client.ttl(PREFIX + "key") == -1


def test_each_client_applies_its_own_time_to_live(server: Server) -> None:
    RedisStore(server.url).put("key", CachedAnswer((("a", (1,)),), "stop", time.time() - 100))
    assert RedisStore(server.url, ttl_s=99).get("key") is None


def test_clearing_counts_and_removes_ours_and_no_other_key(server: Server, client: Any) -> None:
    store = RedisStore(server.url)
    client.set("edgelm:something", "else")
    client.set("other", "theirs")
    answers = {str(number): answer(number) for number in range(1_200)}
    for key, kept in answers.items():
        store.put(key, kept)
    stats = store.stats()
    assert stats.entries == 1_200
    assert stats.bytes == sum(len(encode_answer(key, kept)) for key, kept in answers.items())
    store.clear()
    assert store.stats().entries == 0
    assert client.get("other") == b"theirs" and client.get("edgelm:something") == b"else"


@pytest.mark.parametrize("data", [b"", b"A1" + bytes(40), encode_answer("other", answer(1))], ids=["", "0", "other"])
def test_a_damaged_answer_is_not_given_and_removed(
    server: Server, client: Any, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(server.url)
    client.set(PREFIX + "key", data)
    with pytest.raises(CacheCorruptError):
        store.check()
    assert store.get("key") is None
    assert "damaged answer" in caplog.text
    assert not client.exists(PREFIX + "key")
    store.check()


def test_a_key_of_another_type_is_a_cache_error(server: Server, client: Any) -> None:
    client.lpush(PREFIX + "key", "item")
    with pytest.raises(CacheError, match="WRONGTYPE"):
        RedisStore(server.url).get("key")


def test_a_full_server_refuses_new_answers_and_keeps_old_ones(server: Server, client: Any) -> None:
    store = RedisStore(server.url)
    store.put("key", answer(1))
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(CacheError, match="maxmemory"):
            store.put("other", answer(2))
        assert store.get("key") == answer(1)
    finally:
        client.config_set("maxmemory", 0)


def test_a_lost_server_means_memory_only_until_it_is_back(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(server.url)
    cache = ResponseCache(outer=store)
    cache.put("key", answer(1))
    server.stop()
    with pytest.raises(CacheError, match="Redis server at unix://"):
        store.get("key")
    cache.put("other", answer(2))
    assert cache.get("key") == answer(1) and cache.get("other") == answer(2)
    assert cache.get("unknown") is None
    assert caplog.text.count("answers are kept in memory only") == 1
    server.start()
    store.put("key", answer(3))
    assert store.get("key") == answer(3)


def test_engines_share_answers_through_a_server(server: Server, client: Any, tiny_bundle: Path) -> None:
    settings = ResponseCacheSettings(redis_url=server.url, ttl_s=60)
    with load(tiny_bundle, response_cache=settings) as engine:
        first = engine.generate("Once", max_tokens=6)
    with load(tiny_bundle, response_cache=settings) as engine:
        second = engine.generate("Once", max_tokens=6)
    assert (first.stats.response_cache_hit, second.stats.response_cache_hit) == (False, True)
    assert (first.text, first.token_ids) == (second.text, second.token_ids)
    assert len(client.keys("*")) == 1


def test_a_short_run_of_the_stress_script(server: Server) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "stress_caches.py"), "--seconds", "1.5", "--only", "redis"]
    done = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "requests by 2 processes" in done.stdout


# ---- without a server


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://[", "redis://host:port"])
def test_an_invalid_url_is_refused_at_load(url: str, tiny_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="redis_url"):
        load(tiny_bundle, response_cache=ResponseCacheSettings(redis_url=url))


def test_messages_show_no_password() -> None:
    for url in ("redis://user:secret@localhost:1/0", "redis://localhost:1?password=secret"):
        with pytest.raises(CacheError) as caught:
            RedisStore(url).get("key")
        assert "secret" not in str(caught.value)
        assert "redis://localhost:1" in str(caught.value)


def test_without_redis_py_the_pip_command_is_shown(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"edgelm\[redis\]"):
        load(tiny_bundle, response_cache=ResponseCacheSettings(redis_url="redis://localhost"))
