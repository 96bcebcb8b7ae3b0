"""The response cache as users see it: `load`, `edgelm run`, `edgelm cache`; on real bundles, across processes."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edgelm.runtime import Bundle, Chunk, Completion, Engine, ResponseCacheSettings, load
from edgelm.runtime.caches.responses.cache import open_response_cache
from edgelm.runtime.cli import main
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.host.home import home
from edgelm.runtime.sessions import numerics
from edgelm.runtime.text.tokenizer import Tokenizer


def ask(bundle: Path, prompt: str = "Once", max_tokens: int = 6) -> Completion:
    with load(bundle, threads=1, response_cache=True) as engine:
        return engine.generate(prompt, max_tokens=max_tokens)


def talkative(bundle: Path) -> Engine:
    """The bundle's engine with a fake model that writes a letter in every step and never stops."""
    opened = Bundle.open(bundle)
    tokenizer = Tokenizer(opened.path / "tokenizer.json")
    letters = tokenizer.encode("abcdefghijklmnop")
    session = FakeSession(257, lambda tokens: letters[len(tokens) % len(letters)])
    return Engine(opened, session, tokenizer, open_response_cache(True))


def parts(chunks: Sequence[Chunk]) -> list[tuple[str, tuple[int, ...], str | None]]:
    return [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in chunks]


def shell(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgelm.runtime.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- engines


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_programs_lose_no_answer_that_they_printed(tiny_bundle: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "kill_programs.py"
    command = [sys.executable, str(script), str(tiny_bundle), "--kills", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "8 programs killed" in last and " 0 answers printed" not in last and last.endswith(" 0 lost")


def test_a_later_engine_streams_what_an_earlier_one_computed(tiny_bundle: Path) -> None:
    with talkative(tiny_bundle) as engine:
        first = list(engine.stream("Once upon", max_tokens=20))
    with talkative(tiny_bundle) as engine:
        second = list(engine.stream("Once upon", max_tokens=20))
    assert len(first) == 21
    assert parts(second) == parts(first)
    assert first[-1].stats is not None and second[-1].stats is not None
    assert (first[-1].stats.response_cache_hit, second[-1].stats.response_cache_hit) == (False, True)
    assert second[-1].stats.generated_tokens == first[-1].stats.generated_tokens


def test_the_database_is_in_the_home_and_can_be_left_out(tiny_bundle: Path, edgelm_home: Path) -> None:
    for wanted in (False, ResponseCacheSettings(disk=False)):
        with load(tiny_bundle, threads=1, response_cache=wanted) as engine:
            engine.generate("Once", max_tokens=3)
    assert not edgelm_home.exists()
    ask(tiny_bundle)
    assert stat.S_IMODE((edgelm_home / "responses" / "responses.sqlite").stat().st_mode) == 0o600


def test_a_program_that_asks_for_nothing_leaves_nothing_on_the_disk(tiny_bundle: Path, edgelm_home: Path) -> None:
    with load(tiny_bundle, threads=1) as engine:
        for _ in range(2):
            done = engine.generate("Once upon a time, there was a little girl named Lily.", max_tokens=40)
        list(engine.stream("Once upon", max_tokens=9, temperature=1.0))
        engine.generate_batch(["one", "two"], max_tokens=3)
    assert done.stats.response_cache_hit, "answers are cached while the program runs"
    assert not edgelm_home.exists()


@pytest.mark.parametrize("count", [2, 5])
def test_equal_requests_at_once_are_computed_once(tiny_bundle: Path, count: int) -> None:
    done: list[Completion] = []
    with talkative(tiny_bundle) as engine:
        start = threading.Barrier(count)

        def work() -> None:
            start.wait(30)
            done.append(engine.generate("Once upon a time", max_tokens=30))

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(done) == count
    assert [completion.stats.response_cache_hit for completion in done].count(False) == 1
    assert len({(completion.text, completion.token_ids) for completion in done}) == 1


def test_when_the_first_of_two_is_cancelled_the_second_goes_on(tiny_bundle: Path) -> None:
    with talkative(tiny_bundle) as engine:
        alone = engine.generate("Once upon a time", max_tokens=30, stop="zzzzz")
        first, second = (engine.stream("Once upon a time", max_tokens=30) for _ in range(2))
        begun = [next(first), next(second)]
        assert begun[0] == begun[1]
        assert engine._scheduler.counts() == (1, 0)
        first.close()
        rest = list(second)
        assert "".join(chunk.text for chunk in [begun[1], *rest]) == alone.text
        assert rest[-1].stats is not None and not rest[-1].stats.response_cache_hit
        assert engine.generate("Once upon a time", max_tokens=30).stats.response_cache_hit


def test_threads_that_hold_and_want_each_others_requests_are_all_answered(tiny_bundle: Path) -> None:
    """Each thread is in the middle of a stream and asks for the answer that the other thread computes."""
    done: list[Completion] = []
    with talkative(tiny_bundle) as engine:
        stream = engine.stream("a", max_tokens=30)
        next(stream)
        other = threading.Thread(target=lambda: done.extend(engine.generate(one, max_tokens=30) for one in "ba"))
        other.start()
        mine = [engine.generate(prompt, max_tokens=30) for prompt in "ba"]
        list(stream)
        other.join(60)
        assert [one.token_ids for one in done] == [one.token_ids for one in mine]


def test_a_bundle_that_is_replaced_while_loaded_mixes_up_nothing(
    export_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A loaded engine keeps its files and their digest; a later load gets the new files."""
    old, new, place = export_tiny(), export_tiny(scheme="fp32"), tmp_path / "bundle"
    expected = {bundle: ask(bundle, "Tom", 24) for bundle in (old, new)}
    shutil.copytree(old, place)
    with load(place, threads=1, response_cache=True) as engine:
        place.rename(tmp_path / "away")
        shutil.copytree(new, place)
        assert engine.generate("Tom", max_tokens=24).token_ids == expected[old].token_ids
        computed = engine.generate("Tom and", max_tokens=24)
    with load(old, threads=1, response_cache=False) as engine:
        assert engine.generate("Tom and", max_tokens=24).token_ids == computed.token_ids
    with load(place, threads=1, response_cache=True) as engine:
        assert engine.generate("Tom", max_tokens=24).token_ids == expected[new].token_ids
        assert not engine.generate("Tom and", max_tokens=24).stats.response_cache_hit


def test_other_arithmetic_is_another_answer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "onnxruntime" in numerics.of_machine()
    ask(tiny_bundle)
    assert ask(tiny_bundle).stats.response_cache_hit
    monkeypatch.setattr(numerics, "of_machine", lambda: "another processor")
    assert not ask(tiny_bundle).stats.response_cache_hit


def a_file_in_the_way(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_text("")


def garbage(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "responses.sqlite").write_bytes(b"garbage" * 1000)


def newer(place: Path) -> None:
    place.mkdir(parents=True)
    connection = sqlite3.connect(place / "responses.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()


def a_folder_in_place_of_the_file(place: Path) -> None:
    (place / "responses.sqlite").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "warning"),
    [
        (a_file_in_the_way, "check its folder and disk"),
        (a_folder_in_place_of_the_file, "check its folder and disk"),
        (garbage, "was damaged"),
        (newer, "has version 9"),
    ],
)
def test_a_cache_that_cannot_be_used_is_one_warning_and_right_answers(
    prepare: Callable[[Path], None],
    warning: str,
    tiny_bundle: Path,
    edgelm_home: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(tiny_bundle, threads=1, response_cache=False) as engine:
        expected = [engine.generate(prompt, max_tokens=6).token_ids for prompt in ("Once", "Tom")]
    prepare(edgelm_home / "responses")
    with load(tiny_bundle, threads=1, response_cache=True) as engine:
        for _ in range(2):
            again = [engine.generate(prompt, max_tokens=6) for prompt in ("Once", "Tom")]
            assert [done.token_ids for done in again] == expected
    assert all(done.stats.response_cache_hit for done in again), "the memory cache goes on"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and warning in warnings[0]


# ---- commands


def test_run_keeps_its_answer_unless_told_not_to(tiny_bundle: Path) -> None:
    def run(*more: str) -> tuple[str, bool]:
        done = shell("run", tiny_bundle, "Once", "--max-tokens", "5", "--json", *more)
        answer = json.loads(done.stdout)
        return answer["text"], answer["stats"]["response_cache_hit"]

    first, hit = run("--no-response-cache")
    assert not hit
    assert run() == (first, False)
    assert run() == (first, True)
    assert run("--no-response-cache") == (first, False)
    shown = shell("run", tiny_bundle, "Once", "--max-tokens", "5", "--stats")
    assert "from the response cache" in shown.stderr and "tokens/s" not in shown.stderr


def test_cache_shows_checks_and_clears(
    tiny_bundle: Path, edgelm_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cache(action: str) -> dict[str, object]:
        assert main(["cache", action, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["home"] == str(edgelm_home)
        row = printed["caches"][0]
        assert row["kind"] == "responses" and row["max_entries"] == 100_000 and row["max_bytes"] == 256 * 2**20
        return dict(row)

    assert cache("stats")["entries"] == 0
    assert cache("check")["entries"] == cache("clear")["entries"] == 0
    assert not edgelm_home.exists(), "reading creates no file"
    ask(tiny_bundle)
    assert cache("check")["entries"] == cache("stats")["entries"] == 1
    assert main(["cache", "stats"]) == 0
    assert "responses" in (shown := capsys.readouterr().out) and "1 entries of at most 100,000" in shown
    assert cache("clear")["entries"] == 0
    assert not ask(tiny_bundle).stats.response_cache_hit


@pytest.mark.parametrize(("prepare", "message"), [(garbage, "damaged"), (newer, "version 9")])
def test_check_fails_with_one_line(
    prepare: Callable[[Path], None], message: str, edgelm_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(edgelm_home / "responses")
    assert main(["cache", "check"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_cache_without_a_known_action_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["cache"], ["cache", "burn"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "stats" in capsys.readouterr().err


# ---- the home


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"EDGELM_HOME": "/somewhere"}, "/somewhere"),
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/edgelm"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/edgelm"),
        ("linux", {"EDGELM_HOME": ""}, "~/.cache/edgelm"),
        ("linux", {"EDGELM_HOME": "~/mine"}, "~/mine"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "~/Library/Caches/edgelm"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/edgelm"),
        ("win32", {}, "~/AppData/Local/edgelm"),
    ],
)
def test_the_home_is_where_the_platform_has_its_caches(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EDGELM_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert home() == Path(expected).expanduser()
