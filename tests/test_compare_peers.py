"""The comparison with other runtimes: its statistics, tables and plot, and how it identifies a model."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .conftest import ROOT, tiny_llama


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/compare_peers.py, imported with its own folder on the path, as when it runs."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import compare_peers

        yield compare_peers
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def _figures(decode: float, load: float) -> dict[str, Any]:
    return {
        "prefill_128": decode * 20,
        "decode_128": decode,
        "tokens_128": [1, 2, 3],
        "load_s": load,
        "first_token_s": load + 0.1,
        "file_mb": 136.0,
        "peak_mb_128": 300.0,
    }


@pytest.fixture
def found(script: ModuleType) -> dict[str, Any]:
    """Three rounds. genai fails from the second on, and optimum could not be installed."""
    rounds = [
        {"edgelm-int8": _figures(100, 0.2), "genai-int8": _figures(80, 0.4), "llama.cpp-q8_0": _figures(50, 0.1)},
        {"edgelm-int8": _figures(120, 0.3), "genai-int8": {}, "llama.cpp-q8_0": _figures(80, 0.1)},
        {"edgelm-int8": _figures(110, 0.4), "genai-int8": {}, "llama.cpp-q8_0": _figures(110, 0.1)},
    ]
    failures = {"genai-int8": {"128": "ended by SIGSEGV"}, "optimum-int8": {"installation": "no such version"}}
    names = ["edgelm-int8", "genai-int8", "llama.cpp-q8_0", "optimum-int8"]
    facts = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A CPU", "features": ["avx2"], "threads": 2},
        "versions": {"genai": {"onnxruntime-genai": "1.2.3", "torch": "4"}},
    }
    report: dict[str, Any] = script.report.summarize([script.PEERS[name] for name in names], rounds, failures) | facts
    return report


def test_medians_ranges_and_ratios(found: dict[str, Any]) -> None:
    llama = found["peers"]["llama.cpp-q8_0"]
    assert llama["medians"]["decode_128"] == 80
    assert llama["ranges"]["decode_128"] == [50, 110]
    # The median of the rounds' ratios 2.0, 1.5 and 1.0, not the ratio of the medians.
    assert llama["ratios"]["decode_128"] == 1.5
    assert "tokens_128" not in llama["medians"]
    assert found["peers"]["optimum-int8"]["medians"] == {}


def test_best_int8_peer_is_the_fastest_or_the_smallest(found: dict[str, Any]) -> None:
    best = found["to_best"]
    assert set(best) == {"edgelm-int8"}
    assert best["edgelm-int8"]["decode_128"] == {"peer": "genai-int8", "ratio": 110 / 80}
    assert best["edgelm-int8"]["load_s"] == {"peer": "llama.cpp-q8_0", "ratio": pytest.approx(3)}


def test_four_bits_are_compared_with_four_bits(script: ModuleType) -> None:
    names = ["edgelm-int4-kernels", "genai-int8", "genai-int4", "llama.cpp-q4_k_m"]
    speeds = dict(zip(names, (200.0, 300.0, 100.0, 125.0), strict=True))
    rounds = [{name: {"decode_128": speed} for name, speed in speeds.items()}]
    best = script.report.summarize([script.PEERS[name] for name in names], rounds, {})["to_best"]
    assert best == {"edgelm-int4-kernels": {"decode_128": {"peer": "llama.cpp-q4_k_m", "ratio": 1.6}}}


def test_tables_hold_figures_and_reasons(script: ModuleType, found: dict[str, Any]) -> None:
    text = script.report.markdown(found)
    assert "A CPU (avx2), 2 threads, rounds: 3, 2026-01-02: onnxruntime-genai 1.2.3." in text
    assert "| edgelm, INT8, INT8 cache | 2,200 (2,000 to 2,400) | 110 (100 to 120) |" in text
    assert "| 0.30 (0.20 to 0.40) |" in text
    assert "- onnxruntime-genai, int8, measurement at 128 tokens: ended by SIGSEGV" in text
    assert "- optimum-onnx, int8, installation: no such version" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 6, 8}


def test_nothing_measured_still_names_the_reasons(script: ModuleType) -> None:
    facts = {"date": "2026-01-02", "machine": {"cpu": "A", "features": [], "threads": 1}, "versions": {}}
    peer = script.PEERS["genai-int8"]
    text = script.report.markdown(script.report.summarize([peer], [], {peer.name: {"conversion": "disk full"}}) | facts)
    assert "onnxruntime-genai, int8, conversion: disk full" in text


def test_plot_is_an_svg_with_every_peer_that_was_measured(
    script: ModuleType, found: dict[str, Any], tmp_path: Path
) -> None:
    script.report.plot(found, tmp_path / "peers.svg")
    root = ET.parse(tmp_path / "peers.svg").getroot()  # noqa: S314 (written by the line above)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "peers.svg").read_text(encoding="utf-8")
    assert "llama.cpp, Q8_0" in text
    assert "optimum-onnx" not in text


def test_prompts_differ_only_in_their_first_token_and_fit_the_vocabulary(script: ModuleType) -> None:
    from peers import harness

    first, second = harness.prompt(100, 0, 1000), harness.prompt(100, 1, 1000)
    assert len(first) == 100 and first[0] != second[0] and first[1:] == second[1:]
    assert all(0 <= token < 1000 for token in harness.prompt(5000, 3, 1000))


def test_timing_counts_what_came_after_the_first_token(script: ModuleType) -> None:
    from peers import harness

    class Fake:
        def generate(self, ids: list[int], count: int) -> Iterator[int]:
            yield from range(count)

    first, rate, tokens = harness.timed(Fake(), [1, 2], 5)
    assert first >= 0 and rate > 0 and tokens == [0, 1, 2, 3, 4]
    with pytest.raises(SystemExit, match="1 tokens came instead of 3"):
        harness.timed(type("Short", (), {"generate": lambda *_: iter([7])})(), [1], 3)


def test_a_moved_model_is_recognized_and_older_readers_get_a_copy(script: ModuleType, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (model / "config.json").write_text('{"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}')
    copy = script.readable(model, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((copy / "config.json").read_text())["rope_theta"] == 5.0
    assert "rope_scaling" not in json.loads((copy / "config.json").read_text())
    assert json.loads((copy / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "TokenizersBackend" in (model / "tokenizer_config.json").read_text()
    before = script.fingerprint(model)
    assert script.fingerprint(model.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"others!")
    assert script.fingerprint(tmp_path / "moved") != before


def test_a_failing_program_is_reported_with_its_last_line(script: ModuleType) -> None:
    from peers import environments

    with pytest.raises(environments.PeerError, match=r"^no wheel fits$"):
        environments.run([sys.executable, "-c", "import sys; sys.exit('first line\\nno wheel fits')"])
    with pytest.raises(environments.PeerError, match="SIGKILL"):
        environments.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


def test_every_peer_has_an_adapter_and_pinned_packages(script: ModuleType) -> None:
    from peers import environments

    for peer in script.PEERS.values():
        assert (ROOT / "scripts" / "peers" / f"{peer.adapter}.py").is_file()
        assert all("==" in package for package in environments.PACKAGES[peer.adapter])


class Told:
    """A model whose logits at a position depend only on the token there."""

    def __init__(self, table: Any) -> None:
        self.table, self.asked = table, []

    def logits(self, ids: list[int]) -> Any:
        self.asked.append(ids)
        return self.table[ids]

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        return [ids[-1]] * count


def test_quality_is_measured_as_edgelm_eval_measures_it(script: ModuleType, tmp_path: Path) -> None:
    """Same windows, same scored positions, each scored once."""
    from edgelm.runtime.evaluation.scoring import negative_log_likelihood, score
    from edgelm.runtime.fake import FakeSession

    random = np.random.default_rng(0)
    ids = random.integers(0, 50, 700).tolist()
    table = random.normal(0, 2, (50, 50)).astype(np.float32)
    other = (table + random.normal(0, 0.2, table.shape)).astype(np.float32)
    task = {"ids": ids, "window": 128, "stride": 64, "prompts": [[1, 2]], "answer_tokens": 3, "ends": []}
    reference = script.quality.measure(Told(table), task, tmp_path, True)
    assert reference["kl"] == 0 and reference["same_token"] == 1 and reference["answers"] == [[2, 2, 2]]
    model = Told(other)
    found = script.quality.measure(model, task, tmp_path, False)

    class Session(FakeSession):
        def step(self, token_ids: Any, keep: int = 1) -> Any:
            super().step(token_ids, keep)
            return other[self.tokens[-keep:]]

    session = Session(50, lambda _: 0)
    losses = np.concatenate(
        [negative_log_likelihood(logits, targets) for targets, logits in score(session, ids, 128, 64)]
    )
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-6)
    assert found["tokens"] == len(losses) == len(ids) - 1
    assert [window[0] for window in model.asked] == [ids[begin] for begin in range(0, 640, 64)]
    left, right = (np.float64(one) - np.log(np.exp(np.float64(one)).sum(1, keepdims=True)) for one in (table, other))
    each = (np.exp(left) * (left - right)).sum(1)
    assert found["kl"] == pytest.approx(each[ids[:-1]].mean(), rel=1e-4)


def test_transformers_answers_prompts_together_as_it_does_alone(script: ModuleType) -> None:
    from peers import transformers as adapter

    model = adapter.Loaded(tiny_llama())
    draw = np.random.default_rng(4)
    prompts = [draw.integers(0, 250, size).tolist() for size in (5, 17, 9, 30, 12, 5, 8, 3, 11, 14, 6, 21)]
    together = model.answers(prompts, 12, [])
    assert together == [list(model.generate(prompt, 12)) for prompt in prompts]
    end = together[3][5]
    expected = together[3][: together[3].index(end)]
    assert model.answers(prompts, 12, [end])[3] == expected
    task = {"ids": [], "prompts": prompts[:2], "answer_tokens": 12, "ends": []}
    assert script.quality.measure(model, task, ROOT, True) == {"answers": together[:2]}


def test_answers_count_as_equal_only_as_a_whole(script: ModuleType) -> None:
    found = script.quality.equal_answers([[1, 2], [3, 4], [5], []], [[1, 2], [3, 5], [6], []])
    assert found == {"answer_count": 4, "equal_answers": 2, "equal_first": 3}


def test_quality_stands_in_the_tables(script: ModuleType, found: dict[str, Any]) -> None:
    row = {"kl": 0.00391, "kl_p99": 0.05, "perplexity": 26.5, "same_token": 0.961}
    row |= {"answer_count": 80, "equal_answers": 51, "equal_first": 79}
    text = script.report.markdown(found | {"quality": {"llama.cpp-q8_0": {"label": "llama.cpp, Q8_0", **row}}})
    assert "| llama.cpp, Q8_0 | 0.00391 | 0.0500 | 26.500 | 96.10% | 51 of 80 | 79 of 80 |" in text


CPUINFO = (
    "processor : 0\nflags : fpu sse4_2 avx f16c fma bmi2 avx2 avx512f avx512cd avx512vl avx512dq avx512bw {more}\n"
)


def test_llama_cpp_is_built_for_the_usable_instruction_sets(script: ModuleType, tmp_path: Path) -> None:
    from peers import environments, processor

    (tmp_path / "cpuinfo").write_text(CPUINFO.format(more="avx512_vnni"), encoding="utf-8")
    settings = processor.llama_cpp_settings(processor.cpu_flags(tmp_path / "cpuinfo"))
    assert "-DGGML_NATIVE=OFF" in settings and "-DGGML_AVX512=ON" in settings and "-DGGML_AVX512_VNNI=ON" in settings
    assert "-DGGML_AVX_VNNI=OFF" in settings and not any("AMX" in setting for setting in settings)
    assert "-DGGML_AVX512=OFF" in processor.llama_cpp_settings({"avx2", "avx512f"})
    assert processor.llama_cpp_settings({"asimd", "asimddp", "i8mm"})[1] == "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+i8mm"
    assert processor.llama_cpp_settings(set()) == ["-DGGML_NATIVE=ON"]
    assert all("CMAKE_ARGS" in settings for settings in environments.BUILDS.values())
