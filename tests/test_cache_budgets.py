"""Budgets that outlive a process: the file, the command that sets it, and the code that reads it."""

from __future__ import annotations

import contextlib
import json
import logging
import stat
import sys
from pathlib import Path

import pytest

from edgelm.runtime import PrefixCacheSettings, ResponseCacheSettings, load
from edgelm.runtime.caches.budgets import Budgets, default_budgets, read_budgets, write_budgets
from edgelm.runtime.caches.prefixes.files import BlockFiles, found_files, read_budget
from edgelm.runtime.caches.prefixes.memory import new_block
from edgelm.runtime.caches.responses.answers import CachedAnswer, response_key
from edgelm.runtime.caches.responses.database import DiskBudget
from edgelm.runtime.caches.responses.sqlite import SqliteStore
from edgelm.runtime.cli import main
from edgelm.runtime.errors import CacheCorruptError, CacheError, CacheVersionError

MIB = 2**20


def write(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "budgets.json").write_text(text, encoding="utf-8")


def test_without_a_file_the_defaults_apply(edgelm_home: Path) -> None:
    assert read_budgets(edgelm_home) == default_budgets() == Budgets()
    assert not edgelm_home.exists()


def test_what_is_written_is_read(edgelm_home: Path) -> None:
    wanted = Budgets(
        ResponseCacheSettings(memory_bytes=5, disk_bytes=3 * MIB, ttl_s=60.5, policy="lfu"),
        PrefixCacheSettings(memory_bytes=0, disk=False),
    )
    write_budgets(edgelm_home, wanted)
    assert read_budgets(edgelm_home) == default_budgets() == wanted
    assert [path.name for path in edgelm_home.iterdir()] == ["budgets.json"]
    if sys.platform != "win32":
        assert stat.S_IMODE((edgelm_home / "budgets.json").stat().st_mode) == 0o600


def test_only_budgets_that_differ_from_the_defaults_are_written(edgelm_home: Path) -> None:
    write_budgets(edgelm_home, Budgets(prefixes=PrefixCacheSettings(disk_bytes=2 * MIB)))
    data = json.loads((edgelm_home / "budgets.json").read_text(encoding="utf-8"))
    assert data == {"version": 1, "responses": {}, "prefixes": {"disk_bytes": 2 * MIB}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no valid JSON|not valid JSON"),
        ("\udcff", "not UTF-8"),
        ("[]", "no version"),
        ("{}", "no version"),
        ('{"version": true}', "no version"),
        ('{"version": 1, "answers": {}}', "unknown key answers"),
        ('{"version": 1, "responses": []}', "responses is not an object"),
        ('{"version": 1, "responses": {"folder": "/"}}', "unknown key responses.folder"),
        ('{"version": 1, "responses": {"disk_bytes": 1}}', "disk_bytes must be"),
        ('{"version": 1, "responses": {"disk_entries": 9223372036854775808}}', "disk_entries must be"),
        (f'{{"version": 1, "responses": {{"memory_bytes": 1{"0" * 400}}}}}', "memory_bytes must be"),
        (f'{{"version": 1, "responses": {{"ttl_s": 1{"0" * 400}}}}}', "ttl_s must be"),
        (f'{{"version": 1, "prefixes": {{"disk_bytes": 1{"0" * 5000}}}}}', "not valid JSON"),
        ('{"version": 1, "responses": {"policy": "fifo"}}', "policy must be"),
        ('{"version": 1, "prefixes": {"disk_bytes": "1GB"}}', "disk_bytes must be"),
    ],
)
def test_an_invalid_file_is_an_error_for_the_command_and_a_warning_for_load(
    edgelm_home: Path, text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    edgelm_home.mkdir(parents=True)
    (edgelm_home / "budgets.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CacheCorruptError, match=words):
        read_budgets(edgelm_home)
    for action in ("budget", "check"):
        assert main(["cache", action]) == 1
    with caplog.at_level(logging.WARNING):
        assert default_budgets() == default_budgets() == Budgets()
    (record,) = caplog.records
    assert "default budgets" in record.getMessage()


def test_a_newer_file_is_left_alone(edgelm_home: Path) -> None:
    write(edgelm_home, '{"version": 2}')
    with pytest.raises(CacheVersionError, match="newer edgelm"):
        read_budgets(edgelm_home)
    assert main(["cache", "budget", "--prefixes-disk", "1GiB"]) == 1
    assert (edgelm_home / "budgets.json").read_text(encoding="utf-8") == '{"version": 2}'


def test_a_place_that_cannot_be_written_is_an_error(edgelm_home: Path) -> None:
    edgelm_home.parent.mkdir(exist_ok=True)
    edgelm_home.write_text("a file in the folder's place", encoding="utf-8")
    with pytest.raises(CacheError, match="cannot be written"):
        write_budgets(edgelm_home, Budgets())


def test_the_command_sets_the_given_budgets_and_keeps_the_rest(
    edgelm_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "budget", "--responses-disk", "64MiB", "--prefixes-memory", "1.5 MB"]) == 0
    assert (
        main(["cache", "budget", "--responses-ttl", "7d", "--responses-policy", "lfu", "--prefixes-disk", "off"]) == 0
    )
    assert read_budgets(edgelm_home) == Budgets(
        ResponseCacheSettings(disk_bytes=64 * MIB, ttl_s=7 * 86400.0, policy="lfu"),
        PrefixCacheSettings(memory_bytes=1_500_000, disk=False),
    )
    capsys.readouterr()
    assert main(["cache", "budget"]) == 0
    shown = capsys.readouterr().out
    assert "disk 64 MiB" in shown
    assert "disk off" in shown
    assert main(["cache", "budget", "--responses-ttl", "off", "--prefixes-disk", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["responses"]["ttl_s"] is None
    assert found["prefixes"] == {"memory_bytes": 1_500_000, "disk": True, "disk_bytes": 2**30}


@pytest.mark.parametrize("words", [["--responses-disk", "many"], ["--prefixes-disk", "1XB"], ["--responses-ttl", "-1"]])
def test_an_unreadable_size_is_a_usage_error(edgelm_home: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as found:
        main(["cache", "budget", *words])
    assert found.value.code == 2
    assert not edgelm_home.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["budget", "--responses-disk", "1kB"],
        ["stats", "--responses-disk", "1GB"],
        ["budget", "--responses-ttl", "0"],
        ["budget", "--responses-disk", "10000000000GiB"],
        ["budget", "--prefixes-memory", "9" * 400],
        ["budget", "--responses-ttl", "9" * 400],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_impossible_budgets_are_refused_and_nothing_is_written(edgelm_home: Path, words: list[str]) -> None:
    assert main(["cache", *words]) == 1
    assert not (edgelm_home / "budgets.json").exists()


def test_an_unlimited_budget_keeps_the_answers_that_are_there(
    edgelm_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, budget = edgelm_home / "responses", DiskBudget(sys.maxsize, sys.maxsize)
    wanted = CachedAnswer((("x", (1,)),), "stop")
    for key in ("a", "b"):
        with contextlib.closing(SqliteStore(folder, budget)) as store:
            store.put(response_key("d", [1], {key: 1}), wanted)
    assert main(["cache", "check"]) == 0
    with contextlib.closing(SqliteStore(folder)) as store:
        assert store.get(response_key("d", [1], {"a": 1})) == wanted
        assert store.stats().max_entries == store.stats().max_bytes == sys.maxsize
    assert not caplog.records
    assert not list(folder.glob("*.corrupt-*"))


def test_the_largest_size_is_read_to_the_byte(edgelm_home: Path) -> None:
    assert main(["cache", "budget", "--responses-disk", str(sys.maxsize), "--prefixes-memory", str(2**53 + 1)]) == 0
    found = read_budgets(edgelm_home)
    assert (found.responses.disk_bytes, found.prefixes.memory_bytes) == (sys.maxsize, 2**53 + 1)


@pytest.mark.parametrize("text", ["-5", "+5", "1_0", "9" * 19 + "0", "9" * 400, "", "many", "0"])
def test_an_invalid_budget_file_warns_and_deletes_nothing(
    edgelm_home: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edgelm_home / "prefixes"
    files = BlockFiles(folder, 16 * MIB)
    files.put(b"a" * 32, 1e9, new_block(60_000))
    (folder / "budget").write_text(text, encoding="ascii")
    assert read_budget(folder) is None
    assert "no number of bytes" in caplog.text
    assert main(["cache", "check"]) == 0
    BlockFiles(folder, 16 * MIB).put(b"b" * 32, 1e9, new_block(60_000))
    assert read_budget(folder) == 16 * MIB
    assert len(list(found_files(folder))) == 2


def test_a_lower_budget_takes_effect_at_once(edgelm_home: Path) -> None:
    store = SqliteStore(edgelm_home / "responses", DiskBudget(64 * MIB, 10_000))
    for index in range(64):
        store.put(response_key("d", [index], {}), CachedAnswer((("x" * 60_000, (1,)),), "stop"))
    store.close()
    files = BlockFiles(edgelm_home / "prefixes", 64 * MIB)
    for index in range(64):
        files.put(bytes([index]) * 32, 1e9 + index, new_block(60_000))
    assert main(["cache", "budget", "--responses-disk", "1MiB", "--prefixes-disk", "1MiB"]) == 0
    assert (edgelm_home / "responses" / "responses.sqlite").stat().st_size <= MIB
    left = list(found_files(edgelm_home / "prefixes"))
    assert 0 < sum(file.bytes for file in left) <= MIB
    assert min(file.used for file in left) > 1e9 + 40, "the most recently used files stay"
    assert read_budget(edgelm_home / "prefixes") == MIB
    assert main(["cache", "check"]) == 0


def test_load_reads_the_file_and_arguments_override_it(tiny_bundle: Path, edgelm_home: Path) -> None:
    assert main(["cache", "budget", "--responses-disk", "2MiB", "--prefixes-disk", "3MiB"]) == 0
    prompt = list(range(40))
    with load(tiny_bundle, response_cache=True, prefix_cache=True) as engine:
        engine.generate(token_ids=prompt, max_tokens=2)
    assert budget_of(edgelm_home) == 2 * MIB
    assert read_budget(edgelm_home / "prefixes") == 3 * MIB
    settings = {
        "response_cache": ResponseCacheSettings(disk_bytes=4 * MIB),
        "prefix_cache": PrefixCacheSettings(disk_bytes=5 * MIB),
    }
    with load(tiny_bundle, **settings) as engine:  # type: ignore[arg-type]
        engine.generate(token_ids=[7, *prompt], max_tokens=2)
    assert budget_of(edgelm_home) == 4 * MIB
    assert read_budget(edgelm_home / "prefixes") == 5 * MIB


def budget_of(home: Path) -> int | None:
    store = SqliteStore(home / "responses")
    try:
        return store.stats().max_bytes
    finally:
        store.close()
