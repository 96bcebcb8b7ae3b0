"""An INT8 cache in both forms: fixed scales per channel, and with kernels a scale stored behind each row.

test_kernels.py covers a single attention; these tests cover whole bundles and stored prefixes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.export import ExportConfig, export_model, fp32_graph
from edgelm.export.passes import call_attention
from edgelm.runtime import PrefixCacheSettings, load
from edgelm.runtime.bundle.folder import GRAPH_NAME, Bundle
from edgelm.runtime.bundle.manifest import CacheType
from edgelm.runtime.cli import main
from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import ROOT, TEXT, WIDE_TARGET, require_kernels, shared

SIZE, SCALE_BYTES = 16, 4
TOKENS = 300  # more than the 256 positions that the cache starts with


@pytest.fixture(scope="module")
def fixed_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported as before scales per row: the graph fixes the length of a row."""
    out = tmp_path_factory.mktemp("fixed") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_attention, "_open_rows", lambda graph: None)
        patch.setattr(fp32_graph, "calls_all_attention", lambda graph: False)
        export_model(ExportConfig(str(tiny_model), target=WIDE_TARGET, out=out))
    return out


@pytest.fixture(scope="module", params=["rows with kernels", "channels", "fixed with kernels"])
def folder(
    request: pytest.FixtureRequest, tiny_bundle: Path, fixed_bundle: Path, monkeymodule: pytest.MonkeyPatch
) -> Path:
    """A bundle, with the kernel switch set for opening it."""
    if request.param == "channels":
        monkeymodule.setenv(kernels.SWITCH, "off")
    else:
        require_kernels(monkeymodule)
    return fixed_bundle if request.param.startswith("fixed") else tiny_bundle


@pytest.fixture(scope="module")
def monkeymodule() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def open_of(folder: Path, threads: int = 1) -> OrtSession:
    bundle = Bundle.open(folder)
    return OrtSession(bundle.path / GRAPH_NAME, bundle.manifest.model, threads)


def row_length(session: OrtSession) -> int:
    session.rewind(0)
    session.step([1])
    (length,) = {buffer.shape[-1] for _, buffer in session.cache.buffers()}
    return int(length)


def ids_of(folder: Path) -> list[int]:
    return Tokenizer(folder / "tokenizer.json").encode(TEXT)[:TOKENS]


def test_a_row_is_as_long_as_its_form_wants(
    tiny_bundle: Path, fixed_bundle: Path, without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Bundle.open(tiny_bundle).manifest.model.kv == CacheType("int8", "token")
    assert Bundle.open(fixed_bundle).manifest.model.kv == CacheType("int8", "channel")
    assert row_length(open_of(tiny_bundle)) == row_length(open_of(fixed_bundle)) == SIZE
    require_kernels(monkeypatch)
    assert row_length(open_of(tiny_bundle)) == SIZE + SCALE_BYTES
    assert row_length(open_of(fixed_bundle)) == SIZE


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 130), min_size=1, max_size=6),
    back=st.integers(0, TOKENS),
    threads=st.integers(1, 2),
)
def test_any_cut_and_any_way_back_has_the_same_bits(folder: Path, cuts: list[int], back: int, threads: int) -> None:
    ids = ids_of(folder)
    whole = open_of(folder).step(ids, TOKENS).copy()
    session = open_of(folder, threads)
    for begin in (0, min(back, TOKENS - 1)):
        session.rewind(begin)
        turn = 0
        while session.length < TOKENS:
            at = session.length
            piece = ids[at : at + cuts[turn % len(cuts)]]
            np.testing.assert_array_equal(session.step(piece, len(piece)), whole[at : at + len(piece)])
            turn += 1
    session.cache.check()


def test_rows_of_a_batch_have_the_bits_of_their_texts_alone(folder: Path) -> None:
    ids, session = ids_of(folder), open_of(folder)
    texts = [ids[:270], ids[5:8], ids[100:140]]
    rows = session.rows()
    for row, text in enumerate(texts):
        rows.feed(row, text)
    got = [rows.step([7, 8, 9]).copy() for _ in range(2)]
    rows.copy(0, 2, 200)
    again = rows.step([7, 8, ids[200]]).copy()
    for row, (text, token) in enumerate(zip(texts, [7, 8, 9], strict=True)):
        session.rewind(0)
        expected = session.step([*text, token, token], 2)
        np.testing.assert_array_equal([step[row] for step in got], expected)
    session.rewind(0)
    np.testing.assert_array_equal(again[2], session.step(ids[:201], 1)[0])


def answer(folder: Path, prompt: list[int]) -> tuple[Any, int]:
    """The answer of an engine with a prefix cache on disk, and the number of tokens it reused."""
    with load(folder, threads=1, response_cache=False, prefix_cache=PrefixCacheSettings()) as engine:
        done = engine.generate(token_ids=prompt, max_tokens=6, logprobs=3)
        return (done.token_ids, done.logprobs), done.stats.reused_tokens


def test_stored_prefixes_are_reused_after_a_restart_only_in_the_same_form(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without scales, read as rows with scales, would be misaligned values."""
    require_kernels(monkeypatch)
    prompt = ids_of(tiny_bundle)[:100]
    cold, reused = answer(tiny_bundle, prompt)
    assert reused == 0
    warm, reused = answer(tiny_bundle, prompt)
    assert (warm, reused) == (cold, 96)
    monkeypatch.setenv(kernels.SWITCH, "off")
    channels, reused = answer(tiny_bundle, prompt)
    assert reused == 0
    assert answer(tiny_bundle, prompt) == (channels, 96)
    monkeypatch.setenv(kernels.SWITCH, "on")
    assert answer(tiny_bundle, prompt) == (cold, 96)


def test_answers_with_scales_of_rows_are_nearer_to_a_float32_caches(
    export_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_kernels(monkeypatch)
    ids = ids_of(export_tiny())
    exact = open_of(export_tiny(kv="float32")).step(ids, TOKENS).copy()
    bundle = Bundle.open(export_tiny())
    errors = {}
    for granularity in ("channel", "token"):
        model = replace(bundle.manifest.model, kv=CacheType("int8", granularity))
        session = OrtSession(bundle.path / GRAPH_NAME, model, 1)
        errors[granularity] = float(np.sqrt(np.mean((session.step(ids, TOKENS) - exact) ** 2)))
    assert errors["token"] < 0.8 * errors["channel"]


def test_a_graph_for_other_runtimes_has_rows_of_one_head(tiny_bundle: Path) -> None:
    graph = ir.load(tiny_bundle / "model.genai.onnx").graph
    values = [value for value in (*graph.inputs, *graph.outputs) if ".key" in (value.name or "")]
    assert len(values) == 4
    assert all(value.shape is not None and value.shape[-1] == SIZE for value in values)


def test_inspect_shows_bytes_per_token_in_both_forms(
    tiny_bundle: Path, fixed_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layers, two heads: 2 x 2 x 2 rows of 16 bytes, or of 20 with scales."""
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert "int8 per token, 128 bytes a token, 160 with kernels" in capsys.readouterr().out
    assert main(["inspect", str(fixed_bundle)]) == 0
    assert "int8 per channel, 128 bytes a token\n" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "granularity"), [("int8", "tokens"), ("float32", "token")])
def test_a_manifest_of_another_granularity_is_refused(
    tiny_bundle: Path, tmp_path: Path, kind: str, granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    text["model"]["kv"] = {"type": kind, "granularity": granularity}
    (tmp_path / "manifest.json").write_text(json.dumps(text), encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"model.kv.granularity of {kind} must be" in capsys.readouterr().err


# A real model, because random weights have no channels and tokens of different magnitude.

REAL_MODEL = Path(os.environ.get("EDGELM_REAL_MODEL", ROOT / "build" / "smollm2"))
WINDOW, WINDOWS = 512, 4


@pytest.fixture(scope="module")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not REAL_MODEL.is_dir():
        pytest.skip(f"no real model in {REAL_MODEL}: set EDGELM_REAL_MODEL to its folder")
    out = tmp_path_factory.mktemp("real") / "bundle"
    return export_model(ExportConfig(str(REAL_MODEL), target="x86-cpu", scheme="fp32", kv="int8", out=out)).path


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most_kl"), [("token", 0.0005), ("channel", 0.0013)])
def test_a_real_model_loses_next_to_nothing(real_bundle: Path, form: str, most_kl: float) -> None:
    """Mean KL divergence of the next token's distribution on a text not used for calibration; float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    text = shared("text/wikitext-2/test.txt").read_text(encoding="utf-8")[:40_000]
    ids = Tokenizer(real_bundle / "tokenizer.json").encode(text)
    with pytest.MonkeyPatch.context() as patch:
        if form == "token":
            require_kernels(patch)
        session = open_of(real_bundle, 2)
    exact = AutoModelForCausalLM.from_pretrained(REAL_MODEL, dtype=torch.float32)
    total = 0.0
    for begin in range(0, WINDOW * WINDOWS, WINDOW):
        piece = ids[begin : begin + WINDOW]
        with torch.no_grad():
            expected = torch.log_softmax(exact(torch.tensor([piece])).logits[0], -1).numpy()
        total += float((np.exp(expected) * (expected - log_probabilities(session, piece))).sum())
    assert total / (WINDOW * WINDOWS) < most_kl


def log_probabilities(session: OrtSession, ids: list[int]) -> Any:
    session.rewind(0)
    logits = np.concatenate([session.step(ids[at : at + 128], 128).copy() for at in range(0, len(ids), 128)])
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
