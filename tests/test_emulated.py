"""Promises across machines, on processors that QEMU emulates; set up with `scripts/arm_check.sh --prepare`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm.export import ExportConfig, export_model

from .conftest import REQUIRE, ROOT

check = pytest.importorskip("scripts.emulated.check", reason="scripts/ is missing")
machines, compare, counting = check.machines, check.compare, check.counting

emulated = pytest.mark.skipif(
    not machines.is_ready() and os.environ.get(REQUIRE) != "all",
    reason="no emulated machines: scripts/arm_check.sh --prepare downloads QEMU and arm64 Debian",
)
HASWELL = "Haswell-noTSX"
Run = Callable[..., "compare.Outcome"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The outcome of `builtin:tales` with a scheme on a processor, computed once for each."""
    bundles: dict[str, Path] = {}
    outcomes: dict[tuple[str, ...], compare.Outcome] = {}

    def outcome(cpu: str, scheme: str = "int8-rowwise", *options: str) -> compare.Outcome:
        if scheme not in bundles:
            out = tmp_path_factory.mktemp("tales") / f"tales-{scheme}"
            bundles[scheme] = export_model(ExportConfig("builtin:tales", target="arm-cpu", scheme=scheme, out=out)).path
        key = (cpu, scheme, *options)
        if key not in outcomes:
            texts = check.cut_text(bundles[scheme], windows=2, tokens=150)
            outcomes[key] = check.run_on(cpu, bundles[scheme], texts, *options)
        return outcomes[key]

    return outcome


@emulated
@pytest.mark.parametrize(
    "cpu", ["cortex-a72", "cortex-a76", HASWELL, pytest.param("neoverse-v1", marks=pytest.mark.slow)]
)
def test_int8_matches_this_machine(run: Run, cpu: str) -> None:
    """Compares perplexity, most likely tokens and systematic error; cuts change no bit."""
    broken = check.broken_int8(cpu, run(check.HOST), run(cpu), run(check.HOST, "fp32"))
    assert not broken


@emulated
def test_both_raspberry_pi_give_the_same_bits(run: Run) -> None:
    assert run("cortex-a72").digest == run("cortex-a76").digest
    assert run("cortex-a72").tokens == run("cortex-a76").tokens


@emulated
def test_fp32_gives_the_same_tokens_on_arm_and_x86(run: Run) -> None:
    assert not check.broken_fp32("cortex-a72", run(check.HOST, "fp32"), run("cortex-a72", "fp32"))


@emulated
def test_undetected_saturation_fails_the_check(run: Run) -> None:
    """The runtime detects that this processor saturates. If it did not, the check of int8 would fail."""
    assert run(HASWELL).saturates
    missed = run(HASWELL, "int8-rowwise", "--saturate")
    assert not missed.saturates
    assert check.broken_int8(HASWELL, run(check.HOST), missed, run(check.HOST, "fp32"))
    assert compare.divergence(run(check.HOST), missed) > 5 * compare.divergence(run(check.HOST), run(HASWELL))


def runtime_tests(cpu: str, bundles: Path, *arguments: str) -> str:
    """The last line of pytest on an emulated processor, over bundles exported on this machine."""
    options = ("-m", "pytest", "-p", "no:cacheprovider", "--bundles", str(bundles), *arguments)
    command = machines.command(cpu, *options)
    home = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(bundles)}
    done = subprocess.run(command, cwd=ROOT, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def bundles(export_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the option --bundles."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "tiny").symlink_to(export_tiny())
    (folder / "tiny-kv-float32").symlink_to(export_tiny(kv="float32"))
    return folder


@emulated
def test_the_runtimes_own_tests_pass_on_arm(bundles: Path) -> None:
    last = runtime_tests("cortex-a72", bundles, "tests/test_kv.py", "tests/test_exactness.py", "-k", _QUICK)
    assert "passed" in last and "failed" not in last


_QUICK = "test_kv or token_by_token or types"
_FILES = ("kv", "exactness", "decode", "prefix_cache", "prefix_files", "cached_engine", "stops")


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cortex-a72", "neoverse-v1"])
def test_all_tests_of_decoding_and_caches_pass_on_arm(bundles: Path, cpu: str) -> None:
    last = runtime_tests(cpu, bundles, *(f"tests/test_{name}.py" for name in _FILES))
    assert "passed" in last and "failed" not in last


@emulated
def test_only_the_counted_steps_are_marked(bundles: Path) -> None:
    """The mark is a system call, which QEMU logs without a plugin."""
    arguments = (str(counting.STEPS), str(bundles / "tiny"), "2", "4", "6")
    command = machines.command("cortex-a72", *arguments, options=("-strace",))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("getsid(0)") == 4


def test_counted_instructions_are_split_into_costs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token after 6 costs 115, one after 26 costs 175; a prompt of 26 costs 182."""
    for name, value in {"_DECODED": 1, "_SHORT": 5, "_LONG": 26}.items():
        monkeypatch.setattr(counting, name, value)
    told = "executed: 1000\na warning: 7\nexecuted: 1115\nexecuted: 1297\nexecuted: 1472\n"
    assert counting.split(told) == {"decode": 115, "context": 3, "prompt": 7}
    with pytest.raises(ValueError, match="unpack"):
        counting.split("executed: 1000\n")


def test_the_counted_model_has_the_proportions_of_the_reference_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "FOLDER", tmp_path)
    part = json.loads((counting.model() / "config.json").read_text(encoding="utf-8"))
    whole = json.loads(counting.reference_model.REFERENCE.read_text(encoding="utf-8"))
    assert part["num_hidden_layers"] * counting.PART == whole["num_hidden_layers"]
    assert part["vocab_size"] == whole["vocab_size"] // counting.PART
    assert part["hidden_size"] == whole["hidden_size"]
