"""What a graphical program needs beside answers: progress, cancelling, rendering, warming up, memory estimates."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Engine, MemoryEstimate, Stream, estimate, estimate_memory, load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.errors import BundleMissingError, EngineClosedError, SettingsError, TemplateError
from edgelm.runtime.sessions.kernels import Use

from .served import saying_engine, session_of
from .test_decode import NewEngine, new_engine, tokenizer, tokenizer_folder
from .test_scheduler import is_soon, slow

__all__ = ["new_engine", "tokenizer", "tokenizer_folder"]

HI = [{"role": "user", "content": "hi"}]
MIB = 1 << 20


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with saying_engine(tmp_path) as engine:
        yield engine


# ---- progress and cancelling


def test_progress_goes_up_while_the_prompt_is_read(new_engine: NewEngine) -> None:
    session = slow()
    session.step_s = 0.02
    stream = new_engine(session, context_length=2_000).stream(token_ids=[1] * 1_200, max_tokens=1)
    assert isinstance(stream, Stream)
    seen = [stream.progress]
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    while reader.is_alive():
        seen.append(stream.progress)
        time.sleep(0.001)
    assert seen == sorted(seen) and {total for _, total in seen} == {1_200}
    assert seen[0][0] == 0 and stream.progress == (1_200, 1_200)
    assert len({done for done, _ in seen}) > 3


def test_progress_is_complete_for_cached_and_shared_answers(tmp_path: Path) -> None:
    with saying_engine(tmp_path, cache=True, pause_s=0.005) as engine:
        first, second = engine.stream("Hello", max_tokens=9), engine.stream("Hello", max_tokens=9)
        next(first)
        next(second)  # the first stream is computing the same answer
        assert second.progress == (5, 5)
        assert "".join(chunk.text for chunk in first)
        with engine.stream("Hello", max_tokens=9) as known:
            assert known.progress == (0, 5)
            next(known)
            assert known.progress == (5, 5)
        assert known.stats is not None


def test_a_stream_that_is_closed_while_it_is_asked_for_computes_nothing(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = slow()
    engine = new_engine(session)
    stream = engine.stream(token_ids=[1, 2], max_tokens=60)
    ask = engine._scheduler.submit

    def ask_and_close(request: Any, **keywords: Any) -> Any:
        listener = ask(request, **keywords)
        closing = threading.Thread(target=stream.close)
        closing.start()
        closing.join()
        return listener

    monkeypatch.setattr(engine._scheduler, "submit", ask_and_close)
    assert list(stream) == []
    assert session.steps == [] and is_soon(engine, (0, 0))


# ---- text and tokens without an answer


def test_messages_are_rendered_and_counted_without_computing(engine: Engine) -> None:
    assert engine.render(HI) == "<user>hi\n<assistant>"
    assert engine.render([*HI, {"role": "assistant", "content": "He"}], continue_final_message=True).endswith("He")
    assert len(engine.encode(messages=HI)) == len("<user>hi\n<assistant>")
    assert engine.context_length == 2000
    assert session_of(engine).steps_done == 0


def test_rendering_wants_a_template_and_knows_no_settings(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="render takes no 'temperature'"):
        engine.render(HI, temperature=1)  # type: ignore[call-arg]
    (tmp_path / "plain").mkdir()
    with saying_engine(tmp_path / "plain", template=None) as plain, pytest.raises(TemplateError, match="no chat"):
        plain.render(HI)


# ---- warming up


def test_warming_up_runs_one_step_and_keeps_no_answer(tmp_path: Path) -> None:
    with saying_engine(tmp_path, cache=True) as engine:
        engine.warm_up()
        engine.warm_up()
        assert session_of(engine).steps_done == 2
        assert engine._responses is not None and len(engine._responses) == 0


def test_later_prompts_reuse_the_warm_up_prompt(tiny_bundle: Path) -> None:
    beginning = "A long beginning of every prompt, which is computed ahead of the first question. " * 3
    with load(tiny_bundle, threads=1) as engine:
        engine.warm_up(beginning)
        done = engine.generate(beginning + "And now?", max_tokens=2)
        assert done.stats.reused_tokens >= len(engine.encode(beginning)) - 1


# ---- unloading


def test_a_closed_engine_says_so(engine: Engine) -> None:
    assert not engine.closed
    engine.close()
    assert engine.closed
    for call in (engine.warm_up, lambda: engine.stream("hi")):
        with pytest.raises(EngineClosedError):
            call()


LOADS = """
import gc, sys
import psutil
from edgelm.runtime import load
own = lambda: psutil.Process().memory_full_info().uss
figures = []
for turn in range(4):
    before = own()
    with load(sys.argv[1], threads=1, response_cache=False, prefix_cache=False) as engine:
        engine.generate("Once upon a time " * 20, max_tokens=20)
    del engine
    gc.collect()
    figures.append(own())
print(*figures)
"""


TAKES = """
import sys
from edgelm.runtime import estimate_memory, load
with load(sys.argv[1], threads=1, response_cache=False, prefix_cache=False) as engine:
    engine.generate(token_ids=[1] * 400, max_tokens=20)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1024 * int(peak), estimate_memory(sys.argv[1]).total_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory returned to the system differs between systems")
def test_loading_and_unloading_again_and_again_takes_no_more_memory(tiny_bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADS, str(tiny_bundle)], capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    assert last - first < 3 * MIB


# ---- how much memory


def test_the_estimate_is_what_the_manifest_says(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, without_kernels: None
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda: 1 << 40)
    bundle = Bundle.open(tiny_bundle)
    weights, model = bundle.manifest.files["model.onnx.data"].bytes, bundle.manifest.model
    token = sum(2 * layer.kv_heads * layer.key_size for layer in model.layers if layer is not None)
    whole, part = estimate_memory(tiny_bundle), estimate_memory(tiny_bundle, context=100, rows=3)
    assert whole.weights_bytes == part.weights_bytes == weights
    assert whole.cache_bytes == model.context_length * token
    assert part.cache_bytes == 3 * 100 * token
    assert estimate_memory(tiny_bundle, context=10**9).cache_bytes == whole.cache_bytes
    assert whole.total_bytes == whole.program_bytes + whole.weights_bytes + whole.cache_bytes + whole.work_bytes
    assert whole.fits


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory differs between systems")
def test_the_estimate_is_close_to_the_memory_taken(tiny_bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TAKES, str(tiny_bundle)], capture_output=True, text=True, check=True)
    taken, estimated = map(int, done.stdout.split())
    assert 0.8 < estimated / taken < 1.6


def test_kernels_need_less_for_their_work_and_scales_in_the_cache(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, without_kernels: None
) -> None:
    without = estimate_memory(tiny_bundle)
    monkeypatch.setattr("edgelm.runtime.sessions.kernels.use_in", lambda _: Use(True, True, True))
    with_kernels = estimate_memory(tiny_bundle)
    assert with_kernels.work_bytes < without.work_bytes
    assert with_kernels.cache_bytes > without.cache_bytes


def test_too_little_memory_is_reported(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10 * MIB)
    found = estimate_memory(tiny_bundle)
    assert isinstance(found, MemoryEstimate)
    assert not found.fits and found.available_bytes == 10 * MIB


@pytest.mark.parametrize("wrong", [{"context": 0}, {"rows": 0}, {"rows": True}, {"context": 1.5}])
def test_impossible_questions_are_refused(tiny_bundle: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="1 or more"):
        estimate_memory(tiny_bundle, **wrong)


def test_a_folder_that_is_no_bundle_has_no_estimate(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError):
        estimate_memory(tmp_path)
