"""Bundles whose answers are not exact under cuts: disabled features, the outputs that say so, and `exact=False`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm.runtime import Engine, load
from edgelm.runtime.bundle.cuts import what_is_off
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.cli import main

Export = Callable[..., Path]
PROMPTS = ["Once upon a time there was a cat. " * 3, "abcabcabcabcabcabcabcabc", "The sun"]
OFF = "batches, kept prefixes and draft tokens are off"


@pytest.fixture(scope="module")
def float_bundle(export_tiny: Export) -> Path:
    return export_tiny(scheme="fp32")


def answers(engine: Engine) -> list[str]:
    return [engine.generate(prompt, max_tokens=24).text for prompt in PROMPTS]


def test_equal_arithmetic_gives_batches_prefixes_and_draft_tokens(
    float_bundle: Path, edgelm_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with load(float_bundle, threads=1, response_cache=False, prefix_cache=False) as plain:
        expected = answers(plain)
        guessed = plain.generate(PROMPTS[1], max_tokens=60, logit_bias={97: 1e6}).stats.guessed_tokens
    assert guessed == 0
    caplog.clear()
    for known in (False, True):
        with load(float_bundle, threads=1, response_cache=False, prefix_cache=True, exact=False) as engine:
            done = engine.generate(PROMPTS[0], max_tokens=24)
            assert done.text == expected[0], "these random weights have no near-ties"
            assert (done.stats.reused_tokens > 0) == known
            assert answers(engine) == expected
            batch = engine.generate_batch(PROMPTS, max_tokens=24)
            assert [one.text for one in batch] == expected
            assert engine.generate(PROMPTS[1], max_tokens=60, logit_bias={97: 1e6}).stats.guessed_tokens > 0
    assert (edgelm_home / "prefixes").is_dir()
    assert not caplog.records


def test_a_batch_is_computed_at_once_only_where_roundings_are_accepted(
    float_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm.runtime.sessions.rows import OrtRows

    steps: list[int] = []
    step = OrtRows.step
    monkeypatch.setattr(OrtRows, "step", lambda self, ids: steps.append(len(ids)) or step(self, ids))
    for exact, most in ((True, 1), (False, 3)):
        steps.clear()
        with load(float_bundle, threads=1, response_cache=False, exact=exact) as engine:
            engine.generate_batch(PROMPTS, max_tokens=12)
        assert max(steps, default=1) == most


@pytest.mark.parametrize("scheme", ["fp32", "int8-tensor"])
def test_load_and_inspect_name_disabled_features_in_one_line(
    scheme: str, export_tiny: Export, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export_tiny(scheme=scheme)
    with load(bundle), caplog.at_level(logging.WARNING):
        lines = [record.getMessage() for record in caplog.records if OFF in record.getMessage()]
    assert len(lines) == 1 and str(bundle) in lines[0]
    assert ("exact=False" in lines[0]) == (scheme == "fp32")
    assert main(["inspect", str(bundle)]) == 0
    assert capsys.readouterr().out.count(OFF) == 1


def test_exact_bundles_have_no_disabled_features(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what_is_off(Bundle.open(tiny_bundle).manifest) is None
    with load(tiny_bundle), load(tiny_bundle, exact=False):
        assert not caplog.records
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert OFF not in capsys.readouterr().out


def test_exact_false_enables_nothing_if_arithmetic_depends_on_the_step(export_tiny: Export, edgelm_home: Path) -> None:
    """int8-tensor has one scale for all tokens of a step."""
    with load(export_tiny(scheme="int8-tensor"), prefix_cache=True, response_cache=False, exact=False) as engine:
        assert engine.generate(PROMPTS[1], max_tokens=60, logit_bias={97: 1e6}).stats.guessed_tokens == 0
    assert not edgelm_home.exists()


def test_commands_accept_inexact_answers_too(float_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(float_bundle), PROMPTS[0], "--max-tokens", "4", "--stats", "--no-response-cache"]
    for known in (False, True):
        assert main([*arguments, "--inexact"]) == 0
        assert ("known" in capsys.readouterr().err) == known
