"""A whole compression: refusals before any work, measurement in one pass, rehearsal, messages."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelm.export import ExportConfig, compress_model, export_model
from edgelm.export.compress.last_words import Passages
from edgelm.export.compress.measure import Measuring
from edgelm.export.compress.reading import Reader
from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.run import rehearse
from edgelm.export.compress.size import weight_bytes
from edgelm.export.compress.training import held_out
from edgelm.export.errors import ExportError, OutputError, RecipeError
from edgelm.export.source.compressed import Record, load_compressed
from edgelm.export.source.loading import load_module
from edgelm.export.texts import built_in_texts, cut_text
from edgelm.runtime.bundle.figures import compression_table
from edgelm.runtime.cli import main

from .conftest import TEXT, byte_tokenizer, tiny_llama
from .test_compress import write_recipe

TRAINING: dict[str, Any] = {"use": "recover", "steps": 4, "batch": 2, "length": 32, "learning_rate": 1e-3}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers with different norms, because a bundle stores equal weights once."""
    module = tiny_llama(num_hidden_layers=4)
    for number, (name, weight) in enumerate(module.named_parameters()):
        if "norm" in name:
            weight.data += torch.rand(weight.shape, generator=torch.Generator().manual_seed(number)) / 10
    module.save_pretrained(tmp_path / "m")
    byte_tokenizer(tmp_path / "m")
    return tmp_path / "m"


class Listener:
    """Records the stages that began and the lines that were said."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lines: list[str] = []

    def started(self, name: str) -> None:
        self.stages.append(name)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def finished(self, record: Any) -> None:
        """Does nothing."""


def compress(model: Path, out: Path, *steps: dict[str, Any], **options: Any) -> tuple[Any, Listener]:
    listener = Listener()
    recipe = write_recipe(out.with_suffix(".toml"), *steps)
    measuring = options.pop("measuring", Measuring())
    work = options.pop("work", compress_model)
    config = ExportConfig(str(model), out=out, compress=recipe, **options)
    return work(config, listener, listener.say, measuring), listener


def refused(
    model: Path, out: Path, *steps: dict[str, Any], error: type[Exception] = ExportError, **options: Any
) -> str:
    """The message of a refusal, which must come no later than while the model is loaded."""
    listener = Listener()
    recipe = write_recipe(out.with_suffix(".toml"), *steps)
    measuring = options.pop("measuring", Measuring())
    config = ExportConfig(str(model), out=out, compress=recipe, **options)
    with pytest.raises(error) as caught:
        compress_model(config, listener, listener.say, measuring)
    assert listener.stages in ([], ["load"])
    assert not out.exists()
    return str(caught.value)


# --- refused before the first step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([TRAINING, {"use": "drop-layers", "last": 4}], "step 2, drop-layers: at most 3 of 4 layers can be removed"),
        (
            [{"use": "drop-layers", "least_useful": 2}, {"use": "drop-layers", "last": 2}],
            "step 2, drop-layers: at most 1 of 2 layers can be removed, not 2",
        ),
        (
            [{"use": "drop-layers", "least_useful": 2}, {"use": "skip-attention", "least_useful": 2}],
            "step 2, skip-attention: at most 1 of 2 attention sublayers",
        ),
        (
            [{"use": "drop-layers", "layers": [1]}, {"use": "skip-attention", "layers": [1]}],
            "step 2, skip-attention: there is no attention sublayer 1: the model has 0, 2, 3",
        ),
        ([TRAINING, {"use": "skip-attention", "layers": [17]}], "step 2, skip-attention: there is no attention"),
        (
            [TRAINING, {"use": "low-rank", "ratio": 0.2, "matrices": ["*c_fc"]}],
            "step 2, low-rank: no plain linear layer",
        ),
        ([TRAINING, {"use": "share-weights", "groups": [[0, 9]]}], "step 2, share-weights: there is no layer 9"),
        ([TRAINING, {"use": "share-weights", "embedding": True}], "step 2, share-weights: LlamaForCausalLM shares"),
        (
            [{"use": "drop-layers", "last": 1}, {**TRAINING, "lora_rank": 33}],
            "step 2, recover: lora_rank is 33, but the smaller side of model.layers.0.self_attn.k_proj is",
        ),
        (
            [{"use": "prune-magnitude", "ratio": 0.5}, {**TRAINING, "lora_rank": 2}],
            "step 2, recover: prune-magnitude set weights to zero",
        ),
        (
            [{"use": "drop-layers", "last": 1}, {**TRAINING, "text": "no.txt"}],
            "step 2, recover: text = 'no.txt' cannot",
        ),
        (
            [{"use": "drop-layers", "last": 1}, {**TRAINING, "held_out": "no.txt"}],
            "step 2, recover: held_out = 'no.txt' cannot be read",
        ),
        ([{"use": "drop-layers", "last": 1}, {**TRAINING, "length": 9000}], "step 2, recover: length is 9000"),
        (
            [{"use": "drop-layers", "last": 1}, {**TRAINING, "use": "distil", "teacher": "/none"}],
            "step 2, distil: ",
        ),
    ],
)
def test_an_impossible_step_is_refused_before_the_first_one(
    model: Path, tmp_path: Path, steps: list[dict[str, Any]], words: str
) -> None:
    assert words in refused(model, tmp_path / "out", *steps)


def test_texts_that_are_too_short_are_refused_before_the_first_step(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 3, encoding="utf-8")
    first = {"use": "drop-layers", "last": 1}
    short = str(tmp_path / "short.txt")
    out = tmp_path / "out"
    assert "has 5 tokens, too few to train on: a row needs 33" in refused(
        model, out, first, {**TRAINING, "text": short}
    )
    assert "has 5 tokens, too few to evaluate on" in refused(model, out, first, {**TRAINING, "held_out": short})
    assert "to calibrate on has 1 tokens, too few" in refused(model, out, first, text=tmp_path / "one.txt")
    measuring = Measuring(passages=tmp_path / "p.jsonl", count=4)
    assert "has 3 passages, fewer than the 4 asked for" in refused(model, out, first, measuring=measuring)
    measuring = Measuring(passages=tmp_path / "none.jsonl")
    assert "none.jsonl cannot be read" in refused(model, out, first, measuring=measuring)


@contextlib.contextmanager
def interrupted_at_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt the block as soon as the first checkpoint is on the disk."""
    from edgelm.export.compress.training.checkpoint import Checkpoint

    save = Checkpoint.save

    def interrupted(self: Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", interrupted)
        yield


def test_a_changed_text_is_noticed_before_the_first_step(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    steps = ({"use": "drop-layers", "last": 1}, {**TRAINING, "text": str(text), "checkpoint_every": 2})
    with interrupted_at_a_checkpoint(monkeypatch):
        compress(model, out, *steps)
    kept = tmp_path / "out.checkpoints" / "2-recover" / "training.safetensors"
    before = kept.read_bytes()
    text.write_text(TEXT[100:] + TEXT[:100], encoding="utf-8")
    words = refused(model, out, *steps)
    assert "step 2, recover: " in words, words
    assert "differs in the training text, the held-out text: " in words
    assert kept.read_bytes() == before
    text.write_text(TEXT, encoding="utf-8")
    _, listener = compress(model, out, *steps)
    assert any(line.startswith("resumed after step 2 of 4") for line in listener.lines)


# --- faults in the middle ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(model: Path, tmp_path: Path) -> None:
    import resource

    step = {**TRAINING, "checkpoint_every": 1}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OutputError, match=r"the checkpoint after step 1 cannot be written .* there is no earlier one"
        ):
            compress(model, tmp_path / "out", step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out.checkpoints" / "1-recover").iterdir())
    record, _ = compress(model, tmp_path / "out", step)
    assert record.steps[0]["training"]["kept_step"] > 0


def test_a_disk_without_room_for_a_checkpoint_is_noticed_before_the_first_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    listener = Listener()
    recipe = write_recipe(tmp_path / "r.toml", TRAINING)
    with pytest.raises(OutputError, match=r"a checkpoint of the training takes [1-9]"):
        compress_model(ExportConfig(str(model), out=tmp_path / "out", compress=recipe), listener, listener.say)
    assert not any(line.startswith("step ") for line in listener.lines)


def test_a_nan_loss_in_the_first_step_blames_the_model_as_it_came(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm.export.compress.training import train as training

    monkeypatch.setattr(training, "next_token", lambda student, rows: student(rows).logits.sum() * float("nan"))
    with pytest.raises(RecipeError, match="not a finite number in the first step, before any weight was changed"):
        compress(model, tmp_path / "out", {**TRAINING, "length": 400})
    assert not (tmp_path / "out.checkpoints").exists()


# --- measuring --------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_module(model: Path, tmp_path: Path) -> None:
    """Computed by hand: the loss of each token but the first, and KL, in windows of 512."""
    record, _ = compress(model, tmp_path / "out", {"use": "drop-layers", "layers": [2]})
    before, after = (record.steps[0][side] for side in ("before", "after"))
    ids = torch.tensor(judged_ids(model))
    source, small = load_module(model), load_compressed(tmp_path / "out")
    losses, divergences = [], []
    for start in range(0, len(ids) - 1, 512):
        window = ids[start : start + 513]
        with torch.no_grad():
            p, q = (torch.log_softmax(item(window[None, :-1]).logits[0], -1) for item in (source, small))
        losses.append(-q.gather(1, window[1:, None]).sum())
        divergences.append((p.exp() * (p - q)).sum())
    count = len(ids) - 1
    assert after["perplexity"] == pytest.approx(float(torch.stack(losses).sum().div(count).exp()), rel=1e-4)
    assert after["kl"] == pytest.approx(float(torch.stack(divergences).sum() / count), rel=1e-2)
    assert before["kl"] == 0
    assert before["agreement_percent"] == 100 > after["agreement_percent"]


def judged_ids(model: Path) -> list[int]:
    """Equal parts of the texts that judge. No step uses them to choose."""
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(model), built_in_texts().judging
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in texts]
    return [int(token) for part in parts for token in part[: 2049 // len(texts)]]


def test_the_first_reading_becomes_the_reference() -> None:
    module = tiny_llama()
    reader = Reader(list(TEXT.encode())[:700], 512)
    first = reader.read(module)
    assert (first.kl, first.same) == (0.0, 1.0)
    again = reader.read(module)
    assert again.loss == pytest.approx(first.loss, abs=1e-6)
    assert again.kl == pytest.approx(0, abs=1e-5)
    assert again.same == 1.0


def test_the_figures_size_is_the_bundles_size(tmp_path: Path) -> None:
    """On a model of real stories, because random weights would not pass the gate."""
    steps = (
        {"use": "skip-attention", "layers": [4]},
        {"use": "prune-structured", "ratio": 0.05},
        {"use": "low-rank", "matrices": ["*down_proj"], "ratio": 0.1},
    )
    model = Path("builtin:tales")
    record, _ = compress(model, tmp_path / "small", *steps, target="x86-cpu")
    report = export_model(ExportConfig(str(tmp_path / "small"), target="x86-cpu", out=tmp_path / "b")).report
    assert record.steps[-1]["after"]["bytes"] == pytest.approx(report["memory"]["after"]["weights_bytes"], rel=1e-3)


def test_measuring_can_be_switched_off(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("the text was read"))
    recipe = write_recipe(tmp_path / "r.toml", {"use": "drop-layers", "last": 1})
    words = ["compress", str(model), "--recipe", recipe, "--out", str(tmp_path / "out"), "--no-measure"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "perplexity" not in shown
    assert re.search(r"drop-layers +[\d,]+ +[\d.]+ kB", shown)
    with pytest.raises(RecipeError, match="passages cannot be measured if measuring is off"):
        Measuring(reads=False, passages=tmp_path / "p.jsonl")


def test_last_words_are_measured_where_passages_are_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(held_out, "_MOST_PASSAGES", 1)
    accuracy = Passages.accuracy

    def counted(self: Passages, module: torch.nn.Module) -> float:
        read.append(len(self.texts))
        return accuracy(self, module)

    monkeypatch.setattr(Passages, "accuracy", counted)
    lines = [json.dumps({"text": f"the cat sat on the {word}"}) for word in ("mat", "hat", "rug")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    measuring = Measuring(passages=tmp_path / "p.jsonl", count=2)
    record, _ = compress(model, tmp_path / "out", TRAINING, measuring=measuring)
    assert record.steps[0]["after"]["last_words_percent"] in (0.0, 50.0, 100.0)
    curve = record.steps[0]["training"]["curve"]
    assert all(point["last_words_percent"] in (0.0, 100.0) for point in curve)
    assert read == [2, *(1 for _ in curve), 2]  # a training evaluates on fewer passages than are measured around it


# --- held-out text ----------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_a_useless_training_ends_early(model: Path, tmp_path: Path) -> None:
    """The target is the source's own predictions, so KL is 0 before the first step and cannot improve."""
    step = {**TRAINING, "keep": "kl", "steps": 40, "evaluate_every": 1, "patience": 3}
    record, listener = compress(model, tmp_path / "out", step)
    training = record.steps[0]["training"]
    assert training["kept_step"] == 0
    assert training["stopped_after"] == 3
    assert [point["step"] for point in training["curve"]] == [0, 1, 2, 3]
    assert record.steps[0]["after"]["perplexity"] == record.steps[0]["before"]["perplexity"]
    assert any("stopped early: no improvement since step 0" in line for line in listener.lines)
    assert "training" not in json.dumps(manifest_of(model, tmp_path, step))


def manifest_of(model: Path, tmp_path: Path, step: dict[str, Any]) -> Any:
    from edgelm.export.source.compressed import without_figures

    return without_figures({**step, "training": {}, "before": {}, "after": {}})


def test_the_best_weights_survive_an_interruption(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The best reading precedes the checkpoint that training resumes from, which holds other weights."""
    step = {**TRAINING, "keep": "kl", "evaluate_every": 1, "checkpoint_every": 2}
    whole, _ = compress(model, tmp_path / "whole", step)
    with interrupted_at_a_checkpoint(monkeypatch):
        compress(model, tmp_path / "out", step)
    again, _ = compress(model, tmp_path / "out", step)
    assert again.steps == whole.steps
    assert whole.steps[0]["training"]["kept_step"] == 0


def test_the_end_of_the_text_is_held_out_and_not_trained_on(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from edgelm.export.compress.step import Workbench
    from edgelm.export.compress.steps.recover import Recover

    bench = Workbench(range(5000), AutoTokenizer.from_pretrained(model), model, tmp_path / "c", 512, print)
    texts = Recover(length=64).read_texts(bench)
    assert (texts.training, texts.held_out) == (list(range(4500)), list(range(4500, 5000)))
    texts = Recover(length=64).read_texts(replace(bench, token_ids=range(400)))
    assert (texts.training, texts.held_out) == (list(range(400)), [])


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_rehearsal_says_what_each_step_would_do_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ({"use": "drop-layers", "last": 1}, {**TRAINING, "steps": 5000})
    record, _ = compress(model, tmp_path / "out", *steps, work=rehearse)
    done, _ = compress(model, tmp_path / "done", steps[0])
    assert record.steps[0]["after"]["parameters"] == done.steps[0]["after"]["parameters"]
    assert record.steps[0]["after"]["bytes"] == done.steps[0]["after"]["bytes"]
    assert record.steps[1]["seconds"] > 2  # an estimate: 10,000 rows take longer to learn than this test takes
    recipe = write_recipe(tmp_path / "r.toml", *steps)
    words = ["compress", str(model), "--recipe", recipe, "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"drop-layers +[\d,]+ \(\d+\.\d %\) +[\d,]+ +[\d.]+ kB +0 s", shown)
    assert "Nothing was written." in shown
    assert not list(tmp_path.glob("out*/")) and not list(tmp_path.glob(".out*"))


def test_progress_is_printed_from_the_start_and_logged_to_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": "skip-attention", "least_useful": 1}, TRAINING)
    log = tmp_path / "log.txt"
    words = ["compress", str(model), "--recipe", recipe, "--out", str(tmp_path / "out"), "--log", str(log)]
    assert main(words) == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "load: begins"
    lines = [line.partition(" ")[2].partition(" ")[2] for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines == [line for line in shown if line]
    for stage in ("measure the source", "1: skip-attention", "2: recover"):
        assert any(line.startswith(f"{stage}: ") and re.search(r"about \d+ s left", line) for line in lines), stage
    for wrong in (str(tmp_path / "no" / "log.txt"), "a\0b"):
        assert main([*words[:-1], wrong, "--force"]) == 1
        assert "--log" in capsys.readouterr().err


def test_curves_and_samples_are_in_the_page(model: Path, tmp_path: Path) -> None:
    record, _ = compress(model, tmp_path / "out", TRAINING)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 2
    assert "held out: " in page and "the source goes on" in page
    assert len(record.steps[0]["training"]["samples"]) == 3
    report = export_model(ExportConfig(str(tmp_path / "out"), out=tmp_path / "b", scheme="fp32")).report
    assert report["compression"][0]["training"] == record.steps[0]["training"]
    assert "the source goes on" in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")


def test_weight_bytes_of_a_model_without_compression() -> None:
    """Computed by hand: int8 matrices, a scale per output, norms, tables of 512 positions, scales of the cache."""
    from edgelm.targets import load_target

    module = tiny_llama()
    matrices = 257 * (64 + 4)  # head and embedding are tied
    matrices += 2 * (2 * 64 * (64 + 4) + 2 * 32 * (64 + 4) + 2 * 96 * (64 + 4) + 64 * (96 + 4))
    rest = 4 * (5 * 64) + 4 * 2 * 513 * 8 + 4 * 2 * (32 + 32)
    assert weight_bytes(module, load_target("x86-cpu"), 512) == matrices + rest


@pytest.mark.parametrize(("limit", "kept"), [(1e-9, False), (100.0, True)])
def test_a_recipe_that_cannot_keep_its_promise_says_so(
    model: Path, tmp_path: Path, limit: float, kept: bool, capsys: Any
) -> None:
    recipe = Path(write_recipe(tmp_path / "mild.toml", {"use": "drop-layers", "last": 1}))
    recipe.write_text(f"max_kl = {limit}\n{recipe.read_text()}")
    arguments = ["compress", str(model), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("above the limit of the recipe mild" in printed) is not kept
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("above the limit of the recipe mild" in page) is not kept


def test_the_table_fits_into_a_terminal_of_80_characters() -> None:
    """With the longest name of a step and all columns."""
    from rich.console import Console

    from edgelm.export.commands.compress import print_table

    figures = {"parameters": 134_515_008, "bytes": 137_600_000, "perplexity": 118.767, "kl": 0.0386}
    figures |= {"agreement_percent": 100.0, "last_words_percent": 100.0}
    steps = ({"use": "quantization-aware", "before": figures, "after": figures, "details": {}},)
    written = io.StringIO()
    record = Record({"source": "model"}, "model", "light", steps)
    print_table(Console(width=80, file=written), record, compression_table(steps))
    lines = written.getvalue().splitlines()
    assert lines[3].split()[:2] == ["source", "134,515,008"]
    assert lines[4].split()[:2] == ["quantization-aware", "134,515,008"]
    assert len(lines) == 5


@pytest.mark.parametrize("limit", [0, -1.0, "small", True])
def test_an_invalid_promise_is_refused(limit: Any) -> None:
    with pytest.raises(RecipeError, match="max_kl must be"):
        parse_recipe({"max_kl": limit, "step": [{"use": "drop-layers", "last": 1}]}, "test", "test.toml")


def test_choosing_and_measuring_use_different_texts(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    halves = "aaaa bbbb\n\n" * 100, TEXT[:1100]
    (tmp_path / "text.txt").write_text("".join(halves), encoding="utf-8")
    record, _ = compress(model, tmp_path / "out", {"use": "drop-layers", "last": 1}, text=tmp_path / "text.txt")
    [(_, judging)] = cut_text("".join(halves), "text").judging
    ids = AutoTokenizer.from_pretrained(model)(judging)["input_ids"]
    expected = Reader(ids, 512).read(load_module(model)).perplexity
    assert record.steps[0]["before"]["perplexity"] == pytest.approx(expected, rel=1e-4)
