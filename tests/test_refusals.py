"""If the system refuses something, or files belong to another user, edgelm gives its own error or a warning."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.export import ExportConfig
from edgelm.export.compress.run import compress_model
from edgelm.export.errors import RecipeError
from edgelm.runtime import load
from edgelm.runtime.caches.prefixes.cache import default_folder as prefixes
from edgelm.runtime.caches.responses.cache import default_folder as responses
from edgelm.runtime.caches.responses.database import mapped_errors
from edgelm.runtime.cli import main
from edgelm.runtime.errors import CacheError, MemoryShortageError, SessionError
from edgelm.runtime.evaluation import scoring
from edgelm.runtime.host import home
from edgelm.runtime.sessions.prepared import Prepared, prepared_for
from edgelm.runtime.text.tokenizer import Tokenizer


def refused(path: str) -> PermissionError:
    return PermissionError(13, "Permission denied", path)


@pytest.fixture
def closed_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """EDGELM_HOME in a folder that cannot be entered. Simulated, because root ignores file modes."""
    closed = tmp_path / "closed"
    monkeypatch.setenv("EDGELM_HOME", str(closed / "home"))
    stat = Path.stat

    def see(self: Path, **options: Any) -> os.stat_result:
        if closed in self.parents:
            raise refused(str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", see)
    return closed / "home"


def test_a_home_that_cannot_be_entered(closed_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Prepared("sha256:0", closed_home / "prepared").is_worth_it(1 << 40)
    assert prepared_for("sha256:0") is None and "Permission denied" in caplog.text
    for folder in (prefixes, responses):
        with pytest.raises(CacheError, match="Permission denied"):
            folder()


def test_the_doctor_and_answers_work_without_a_usable_home(
    closed_home: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) in (0, 1)
    captured = capsys.readouterr()
    assert "caches" in captured.out and not captured.err
    with load(tiny_bundle) as engine:
        assert engine.generate("Once", max_tokens=2).token_ids


@pytest.mark.parametrize("name", ["responses", "prefixes", "prepared"])
def test_folders_of_others_are_not_used(
    name: str, edgelm_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(home.os, "geteuid", lambda: edgelm_home.parent.stat().st_uid + 1)
    assert home.own_folder(edgelm_home / "not there") == edgelm_home / "not there"
    (edgelm_home / name).mkdir(parents=True)
    if name == "prepared":
        assert prepared_for("sha256:0") is None
        assert "belongs to another user" in caplog.text
    else:
        with pytest.raises(CacheError, match="belongs to another user"):
            {"responses": responses, "prefixes": prefixes}[name]()


def test_an_answer_that_cannot_be_cached_is_still_given(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with load(tiny_bundle, response_cache=False) as engine:
        expected = engine.generate(token_ids=[65] * 100, max_tokens=3).token_ids
    shutil.rmtree(os.environ["EDGELM_HOME"], ignore_errors=True)
    monkeypatch.setattr("edgelm.runtime.caches.prefixes.cache.new_block", no_room)
    with load(tiny_bundle, response_cache=False) as engine:
        assert engine.generate(token_ids=[65] * 100, max_tokens=3).token_ids == expected
    assert "finds no room in memory" in caplog.text


def test_a_perplexity_beyond_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    for nats in (1e4, np.nan, np.inf):
        monkeypatch.setattr(scoring, "score", lambda *_: [(np.array([1]), np.zeros((1, 4), np.float32))])
        monkeypatch.setattr(scoring, "negative_log_likelihood", lambda *_, nats=nats: np.array([nats]))
        with pytest.raises(SessionError, match="no finite perplexity"):
            scoring.perplexity(None, [1, 2], 8)  # type: ignore[arg-type]


def test_a_compression_without_a_recipe_or_a_place() -> None:
    for config in (ExportConfig("builtin:tales"), ExportConfig("builtin:tales", compress="light")):
        with pytest.raises(RecipeError, match="needs a recipe and an output folder"):
            compress_model(config)


def test_a_command_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = importlib.metadata.EntryPoint("distil", "no_such_module_at_all", "edgelm.commands")
    monkeypatch.setattr("edgelm.runtime.cli._foreign_commands", lambda: [entry])
    assert main([]) == 0
    assert "distil    (cannot be imported here)" in capsys.readouterr().out
    assert main(["distil"]) == 1
    assert "the command distil is announced and cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["name", "versions", "source", "notes", "target"])
def test_a_manifest_prints_no_control_characters(
    key: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    bad = "\x1b]0;title\x07\x9b2J\u202e"
    change = {
        "name": bad,
        "versions": {bad: "1"},
        "source": {**manifest["source"], "model": bad},
        "notes": [bad],
        "target": {**manifest["target"], "settings": {"x": bad}},
    }[key]
    (bundle / "manifest.json").write_text(json.dumps({**manifest, key: change}))
    assert main(["inspect", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert "cannot be shown" in captured.err and captured.err.strip().isprintable()


def test_an_error_prints_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "a\x1b[2Jb")]) == 1
    error = capsys.readouterr().err
    assert "a\\x1b[2Jb" in error and error.strip().isprintable()


class NoRoom:
    """A tokenizer or database that runs out of memory."""

    def encode(self, *_: Any, **__: Any) -> None:
        raise MemoryError


def test_a_prompt_without_enough_memory(tiny_bundle: Path) -> None:
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json")
    tokenizer._tokenizer = NoRoom()  # type: ignore[assignment]
    with pytest.raises(MemoryShortageError, match="a prompt of 4 characters takes more memory"):
        tokenizer.encode("Once")


def test_a_database_without_enough_memory(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not enough memory"), mapped_errors(tmp_path):
        raise MemoryError


def test_an_export_keeps_libraries_out_of_the_users_home(tmp_path: Path) -> None:
    code = (
        "from edgelm.export import libraries; libraries.redirect();"
        "from edgelm.export.output.charts import Row, bars; bars('a', 'b', [Row('a', '1', [(1, 'ink')])])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    environment |= {"HOME": str(tmp_path / "user"), "EDGELM_HOME": str(tmp_path / "own")}
    (tmp_path / "user").mkdir()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "user").iterdir())
    assert (tmp_path / "own" / "libraries" / "matplotlib").is_dir()
