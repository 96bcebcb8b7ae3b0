"""Prepared weights: same bits, written once, removed when damaged; no failure stops a load."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgelm.runtime import Bundle, load
from edgelm.runtime.caches.kinds import PreparedKind
from edgelm.runtime.cli import main
from edgelm.runtime.errors import BundleCorruptError, CacheCorruptError
from edgelm.runtime.sessions import in_place, prepared
from edgelm.runtime.sessions.loading import open_session

from .conftest import TEXT

# Kernels read the bundle's weights directly, so nothing is prepared for them.
pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_LEAST_WEIGHTS_BYTES", 0)


@pytest.fixture
def loaded_from(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the graphs that onnxruntime loads, in order."""
    found: list[Path] = []
    original = in_place.load_graph

    def spy(graph: Path, *arguments: object, **named: object) -> object:
        found.append(graph.parent)
        return original(graph, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(in_place, "load_graph", spy)
    return found


def answer(bundle: Path) -> tuple[int, ...]:
    with load(bundle, response_cache=False, prepare=True) as engine:
        return engine.generate(TEXT[:50], max_tokens=16).token_ids


def made(home: Path) -> list[Path]:
    return prepared.folders(home / prepared.FOLDER_NAME)


def test_the_second_load_maps_the_first_loads_prepared_form(
    tiny_bundle: Path, edgelm_home: Path, loaded_from: list[Path]
) -> None:
    first = answer(tiny_bundle)
    (folder,) = made(edgelm_home)
    assert answer(tiny_bundle) == first
    assert loaded_from == [tiny_bundle, folder]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_logits_are_the_same_bits(tiny_bundle: Path, edgelm_home: Path) -> None:
    ids = list(range(3, 90))
    runs = []
    for prepare in (False, True, True):
        opened = open_session(Bundle.open(tiny_bundle), 1, prepare)
        runs.append(opened.step(ids, len(ids)).copy())
        opened.close()
    assert made(edgelm_home)
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_nothing_is_written_if_preparing_is_off(tiny_bundle: Path, edgelm_home: Path) -> None:
    with load(tiny_bundle, response_cache=False, prepare=False):
        assert not edgelm_home.exists()


def test_an_existing_prepared_form_is_used_and_a_new_one_is_made_only_on_request(
    tiny_bundle: Path, edgelm_home: Path, loaded_from: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--prepare"], []):
        arguments = ["--max-tokens", "2", "--no-response-cache", "--no-prefix-cache", *options]
        assert main(["run", str(tiny_bundle), "Once", *arguments]) == 0
    (folder,) = made(edgelm_home)
    with load(tiny_bundle), load(tiny_bundle, prepare=False):
        pass
    assert loaded_from == [tiny_bundle, tiny_bundle, folder, folder, tiny_bundle]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "checks.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_prepared_form_is_made_again(tiny_bundle: Path, edgelm_home: Path, name: str, damage: str) -> None:
    first = answer(tiny_bundle)
    (folder,) = made(edgelm_home)
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    assert answer(tiny_bundle) == first
    assert answer(tiny_bundle) == first
    (folder,) = made(edgelm_home)
    prepared.check_folder(folder)


def test_damaged_bundles_are_not_prepared(tiny_bundle: Path, edgelm_home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleCorruptError):
        load(copy, prepare=True)
    assert not made(edgelm_home)


def test_another_version_or_processor_gets_its_own(
    tiny_bundle: Path, edgelm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tiny_bundle)
    monkeypatch.setattr(prepared.numerics, "of_machine", lambda: "another machine")
    answer(tiny_bundle)
    assert len(made(edgelm_home)) == 2


def test_an_unwritable_home_is_one_warning_per_load(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer(tiny_bundle)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_HOME", str(tmp_path / "file" / "home"))
    with caplog.at_level(logging.WARNING):
        assert answer(tiny_bundle) == expected
        assert sum("prepared weights are not used" in record.message for record in caplog.records) == 1
        with load(tiny_bundle):
            assert len(caplog.records) == 1, "no warning unless preparing was asked for"


def test_a_full_disk_is_left_alone(tiny_bundle: Path, edgelm_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    answer(tiny_bundle)
    assert not made(edgelm_home)


def test_the_budget_drops_the_least_recently_used(edgelm_home: Path) -> None:
    root = edgelm_home / prepared.FOLDER_NAME
    forms = [prepared.Prepared(name, root, budget_bytes=2000) for name in ("a", "b", "c")]
    for age, form in zip((300, 200, 100), forms, strict=True):
        with form.making() as folder:
            for name in prepared._FILES:
                (folder / name).write_bytes(bytes(400))
        if form.folder.exists():
            os.utime(form.folder, (time.time() - age,) * 2)
        if form is forms[1]:
            assert forms[0].is_there()  # counts as a use
    assert [form.is_there() for form in forms] == [True, False, True]


def test_leftovers_of_killed_processes_are_removed(edgelm_home: Path) -> None:
    root = edgelm_home / prepared.FOLDER_NAME
    for name, age in (("making-old", 2 * 24 * 3600), ("making-new", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    with prepared.Prepared("a", root).making() as folder:
        for name in prepared._FILES:
            (folder / name).write_bytes(b"x")
    assert not (root / "making-old").exists() and (root / "making-new").exists()
    assert len(prepared.folders(root)) == 1


def test_the_cache_command_shows_checks_and_clears(
    tiny_bundle: Path, edgelm_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(tiny_bundle)
    kind = PreparedKind(edgelm_home)
    assert kind.stats().entries == 1 and kind.stats().bytes > 1000
    assert main(["cache", "check"]) == 0
    (folder,) = made(edgelm_home)
    (folder / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(CacheCorruptError):
        kind.check()
    assert main(["cache", "clear"]) == 0
    assert kind.stats().entries == 0
    assert "prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ['{"model.onnx": [1e999, 1], "model.onnx.data": [1, 1]}', "[" * 100_000, "[]", '{"model.onnx": 5}']
)
def test_an_invalid_checks_file_counts_as_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "checks.json").write_text(text, encoding="utf-8")
    with pytest.raises(CacheCorruptError, match="cannot be read"):
        prepared.check_folder(tmp_path)
