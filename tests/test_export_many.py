"""scripts/export_many.py: what it plans, skips and repeats, how it handles failures, and the same with Ray."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Bundle, load

from .conftest import ROOT, WIDE_TARGET
from .served import with_template

many = pytest.importorskip("scripts.export_many", reason="scripts/ is missing")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> list[str]:
    """Records exported outputs. Bundles are copies of one; the export of a model named "broken" fails."""
    done: list[str] = []

    class Result:
        manifest = Bundle.open(tiny_bundle).manifest

    def export_model(config: Any) -> Result:
        done.append(config.out.name)
        if "broken" in config.model:
            raise RuntimeError("it does not go")
        shutil.copytree(tiny_bundle, config.out, dirs_exist_ok=config.force)
        return Result()

    monkeypatch.setattr("edgelm.export.pipeline.export_model", export_model)
    return done


def run(out: Path, *words: str) -> int:
    status: int = many.main([*words, "--target", "x86-cpu", "--target", "arm-cpu", "--out", str(out), "--in-turn"])
    return status


def test_each_model_is_exported_for_each_target(exports: list[str], tmp_path: Path) -> None:
    assert run(tmp_path, "owner/one", "two") == 0
    assert exports == ["one-x86-cpu", "one-arm-cpu", "two-x86-cpu", "two-arm-cpu"]
    record = json.loads((tmp_path / "one-arm-cpu.json").read_text())
    assert record["asked"]["model"] == "owner/one" and record["error"] is None
    assert record["digest"] == Bundle.open(tmp_path / "one-arm-cpu").manifest.digest


def test_a_failure_stops_no_other_export_and_is_retried(
    exports: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "broken", "two") == 1
    assert len(exports) == 4 and "broken-arm-cpu: failed: RuntimeError: it does not go" in capsys.readouterr().out
    assert "does not go" in json.loads((tmp_path / "broken-x86-cpu.json").read_text())["error"]
    exports.clear()
    assert run(tmp_path, "broken", "two") == 1
    assert exports == ["broken-x86-cpu", "broken-arm-cpu"]
    assert "4 exports, 2 of them done before" in capsys.readouterr().out


def test_existing_bundles_are_not_exported_again(exports: list[str], tmp_path: Path) -> None:
    run(tmp_path, "one")
    exports.clear()
    assert run(tmp_path, "one") == 0 and exports == []
    assert run(tmp_path, "one", "--again") == 0 and len(exports) == 2


@pytest.mark.parametrize(
    "change", ["other settings", "no record", "half a record", "no bundle", "a file cut", "another"]
)
def test_missing_or_different_bundles_are_exported_again(
    exports: list[str], tiny_bundle: Path, tmp_path: Path, change: str
) -> None:
    run(tmp_path, "one")
    exports.clear()
    bundle, record = tmp_path / "one-x86-cpu", tmp_path / "one-x86-cpu.json"
    if change == "other settings":
        assert run(tmp_path, "one", "--kv", "float32") == 0 and len(exports) == 2
        return
    if change == "no record":
        record.unlink()
    elif change == "half a record":
        record.write_text(record.read_text()[:40])
    elif change == "no bundle":
        shutil.rmtree(bundle)
    elif change == "a file cut":
        (bundle / "model.onnx").write_bytes(b"x")
    else:
        shutil.rmtree(bundle)
        with_template(tiny_bundle, bundle)
    assert run(tmp_path, "one") == 0 and exports == ["one-x86-cpu"]


def test_two_models_of_one_name_are_refused(exports: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="two exports would be written"):
        run(tmp_path, "a/one", "b/one")
    assert not exports


def test_without_ray_it_says_what_to_install(
    exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"edgelm\[cluster\].*--in-turn"):
        many.main(["one", "--target", "x86-cpu", "--out", str(tmp_path)])


@pytest.mark.slow
def test_ray_tasks_export_and_one_that_dies_stops_no_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason='not installed: pip install "edgelm[cluster]"')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    words = [str(tiny_model), str(tmp_path / "nothing"), "--target", WIDE_TARGET, "--out", str(tmp_path / "out")]
    words += ["--cpus", "1", "--memory-gb", "1"]
    assert many.main(words) == 1
    printed = capsys.readouterr().out
    assert "tiny-wide: done" in printed and "nothing-wide: failed: SourceError" in printed
    with load(tmp_path / "out" / "tiny-wide", threads=1) as engine:
        assert engine.generate("a", max_tokens=3).token_ids
    assert [many.is_done(job) for job in many.plan(many.parse(words))] == [True, False]


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason='not installed: pip install "edgelm[cluster]"')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(many, "perform", _die_of_one)
    words = [str(tiny_model), "dies", "--target", WIDE_TARGET, "--out", str(tmp_path), "--cpus", "1"]
    assert many.main(words) == 1
    assert "tiny-wide: done" in capsys.readouterr().out
    assert "the process ended" in json.loads((tmp_path / "dies-wide.json").read_text())["error"]


def _die_of_one(job: Any) -> Any:
    if job.model == "dies":
        os._exit(9)
    return many.written(job, many.Outcome("sha256:0", None, 0.1))
