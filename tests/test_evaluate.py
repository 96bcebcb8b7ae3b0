"""`edgelm eval`: perplexity and last-word accuracy, equal for a model and its bundle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.export.gate.torch_session import open_model
from edgelm.runtime.bundle.folder import TOKENIZER_NAME, file_digest
from edgelm.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, parse_manifest
from edgelm.runtime.cli import main
from edgelm.runtime.commands import eval as eval_command
from edgelm.runtime.errors import PromptError, SettingsError, VerificationError
from edgelm.runtime.evaluation.quality import last_words, read_passages, text_against, text_perplexity
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.sessions.loading import open_folder
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import ROOT, TEXT, byte_tokenizer

PASSAGE = "the cat sat on the mat"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    byte_tokenizer(tmp_path)
    return Tokenizer(tmp_path / TOKENIZER_NAME)


def knowing(tokenizer: Tokenizer, *texts: str) -> FakeSession:
    """A session that continues these texts from any of their beginnings."""
    known = [tokenizer.encode(text) for text in texts]

    def follow(tokens: Sequence[int]) -> int:
        found = [ids for ids in known if list(tokens) == ids[: len(tokens)] and len(ids) > len(tokens)]
        return found[0][len(tokens)] if found else 0

    return FakeSession(257, follow)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 64 // 3), (100, 99)])
def test_model_and_bundle_have_one_perplexity(
    tiny_model: Path, export_tiny: Callable[..., Path], window: int | None, stride: int | None
) -> None:
    text = TEXT[:700]
    with open_model(str(tiny_model)) as (context, tokenizer, model):
        torchs = text_perplexity(model, tokenizer, text, context, window=window, stride=stride)
    folder = export_tiny(scheme="fp32")
    bundle, session = open_folder(folder)
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    context = bundle.manifest.model.context_length
    ours = text_perplexity(session, tokenizer, text, context, window=window, stride=stride)
    session.close()
    assert ours.value == pytest.approx(torchs.value, rel=5e-5)
    assert (ours.tokens, ours.window, ours.stride) == (torchs.tokens, torchs.window, torchs.stride)
    assert (ours.window, ours.stride) == (window or 512, stride or 256)


def test_last_words_count_if_the_model_predicts_them(tokenizer: Tokenizer) -> None:
    others = [PASSAGE, "the cat sat on the dog", "a word", "one two three"]
    found = last_words(knowing(tokenizer, PASSAGE, "one two three"), tokenizer, others, 512)
    assert (found.accuracy, found.passages) == (0.5, 4)


def test_a_word_predicted_in_part_does_not_count(tokenizer: Tokenizer) -> None:
    """Each token of the word counts, the blank included, and each is predicted after the true ones before it."""
    session = knowing(tokenizer, "the cat sat on the man")
    assert last_words(session, tokenizer, [PASSAGE], 512).accuracy == 0


def test_white_space_at_the_end_is_no_word(tokenizer: Tokenizer) -> None:
    assert last_words(knowing(tokenizer, PASSAGE), tokenizer, [PASSAGE + " \n"], 512).accuracy == 1


def test_a_long_passage_loses_its_beginning(tokenizer: Tokenizer) -> None:
    session = knowing(tokenizer, PASSAGE[-12:])
    assert last_words(session, tokenizer, [PASSAGE], 12).accuracy == 1
    assert max(map(len, session.steps)) == 11


@pytest.mark.parametrize(("passages", "words"), [([], "no passages"), (["one two", "word"], "passage 2 has no blank")])
def test_passages_without_a_last_word(tokenizer: Tokenizer, passages: list[str], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        last_words(knowing(tokenizer), tokenizer, passages, 512)


@pytest.mark.parametrize("line", ["{", '{"words": 1}', "[]", "3"])
def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match="line 3 is not a JSON object with the key text"):
        read_passages(tmp_path / "p.jsonl")


@pytest.mark.parametrize("sizes", [{"stride": 0}, {"window": 0}, {"window": 8, "stride": 0}], ids=repr)
def test_a_size_of_0_is_refused_and_not_taken_as_the_default(tokenizer: Tokenizer, sizes: dict[str, int]) -> None:
    one, other = knowing(tokenizer, TEXT), knowing(tokenizer, TEXT)
    with pytest.raises(SettingsError, match="found 0"):
        text_perplexity(one, tokenizer, TEXT, 512, **sizes)
    with pytest.raises(SettingsError, match="found 0"):
        text_against(one, other, tokenizer, TEXT, 512, **sizes)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_step_of_the_model_gives_as_many_rows_as_it_is_asked_for(tiny_model: Path, keep: int) -> None:
    with open_model(str(tiny_model)) as (_, _, model):
        whole = model.step([1, 2, 3], 3).copy()
        model.rewind(0)
        rows = model.step([1, 2, 3], keep)
        assert rows.shape == (keep, whole.shape[1])
        assert np.array_equal(rows, whole[3 - keep :])


def test_a_window_beyond_the_context(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="2 to 512 tokens for this model, found 600"):
        text_perplexity(knowing(tokenizer), tokenizer, TEXT, 512, window=600)


def test_the_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT[:600], encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": PASSAGE}) + "\n", encoding="utf-8")
    files = ["--text", str(tmp_path / "t.txt"), "--lambada", str(tmp_path / "p.jsonl")]
    assert main(["eval", str(tiny_bundle), *files, "--window", "128", "--stride", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"]["window"] == 128 and found["perplexity"]["stride"] == 100
    assert found["perplexity"]["tokens"] == 599 and found["lambada"] == {"accuracy": 0.0, "passages": 1}
    assert main(["eval", str(tiny_bundle), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].endswith("on 599 tokens (window 512, stride 256)")
        and lines[2] == "last words     0.00 % of 1 passages"
    )
    # 599 of 600 bytes are scored, each a token.
    bits = 599 / 600 * math.log2(float(lines[0].split()[1]))
    assert float(lines[1].removeprefix("bits per byte  ").split(",")[0]) == pytest.approx(bits, rel=1e-3)


def test_the_command_takes_a_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the entry points that pyproject.toml declares, installed or not; without them, a message names the extra."""
    (tmp_path / "t.txt").write_text(TEXT[:200], encoding="utf-8")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    points = [importlib.metadata.EntryPoint(*item, "edgelm.models") for item in declared["edgelm.models"].items()]
    command = ["eval", str(tiny_model), "--text", str(tmp_path / "t.txt")]
    monkeypatch.setattr(eval_command.importlib.metadata, "entry_points", lambda **_: points)
    assert main(command) == 0
    assert "on 199 tokens (window 512, stride 256)" in capsys.readouterr().out
    monkeypatch.setattr(eval_command.importlib.metadata, "entry_points", lambda **_: [])
    assert main(command) == 1
    assert 'models need the exporter: pip install "edgelm[export]"' in capsys.readouterr().err


class Told(FakeSession):
    """A session whose logits at each position are rows of an array (positions, vocab_size)."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        super().__init__(rows.shape[1], lambda _: 0)
        self._rows = rows

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        super().step(token_ids, keep)
        return self._rows[self.length - keep : self.length]


def rows_like(rows: NDArray[np.float32], change: float) -> NDArray[np.float32]:
    return np.asarray(rows + np.random.default_rng(1).normal(0, change, rows.shape), np.float32)


def test_divergence_from_a_reference(tokenizer: Tokenizer) -> None:
    """Equal to the definition over all rows at once, whatever the pieces are."""
    text = TEXT[:301]
    ids = tokenizer.encode(text)
    theirs = np.random.default_rng(0).normal(0, 2, (len(ids) - 1, 257)).astype(np.float32)
    ours = rows_like(theirs, 0.3)
    found, against = text_against(Told(ours), Told(theirs), tokenizer, text, 512)
    left, right = (rows - np.log(np.exp(rows).sum(1, keepdims=True)) for rows in (np.float64(theirs), np.float64(ours)))
    kl = (np.exp(left) * (left - right)).sum(1)
    assert against.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert against.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert against.same == (theirs.argmax(1) == ours.argmax(1)).mean() < 1
    chosen = np.arange(len(kl)), ids[1:]
    assert found.value == pytest.approx(np.exp(-right[chosen].mean()), rel=1e-5) and found.tokens == len(kl)
    assert against.perplexity == pytest.approx(np.exp(-left[chosen].mean()), rel=1e-5)
    assert against.increase_percent == pytest.approx(100 * (found.value / against.perplexity - 1))


def test_a_reference_that_does_not_fit(tokenizer: Tokenizer) -> None:
    rows = np.ones((100, 257), np.float32)
    with pytest.raises(SettingsError, match="257 and 300 tokens"):
        text_against(Told(rows), Told(np.ones((100, 300), np.float32)), tokenizer, TEXT[:101], 512)
    spoiled = rows.copy()
    spoiled[70, 3] = np.nan
    with pytest.raises(VerificationError, match="logits at token 71 are not all numbers"):
        text_against(Told(spoiled), Told(rows), tokenizer, TEXT[:101], 512)


def test_the_command_compares(
    tiny_bundle: Path, export_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(TEXT[:600], encoding="utf-8")
    command = ["eval", str(tiny_bundle), "--text", str(tmp_path / "t.txt"), "--window", "128", "--against"]
    whole = str(export_tiny(scheme="fp32"))
    assert main([*command, whole, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["model"] == whole
    assert 0 < found["against"]["kl"] < found["against"]["kl_p99"] and 0.5 < found["against"]["same"] <= 1
    assert main([*command[:-1], "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["perplexity"]
    assert found["perplexity"] == {**alone, "value": pytest.approx(alone["value"], rel=1e-9)}
    assert main([*command, str(tiny_bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("(+0.00 %)") and lines[3].startswith("KL divergence  0.00000 nats a token")
    assert lines[4].startswith("same token     100.00 %")


def test_a_reference_with_another_tokenizer(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(TEXT[:600], encoding="utf-8")
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    data = json.loads((other / TOKENIZER_NAME).read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / TOKENIZER_NAME).write_text(json.dumps(data), encoding="utf-8")
    manifest = parse_manifest((other / MANIFEST_NAME).read_text(encoding="utf-8"))
    path = other / TOKENIZER_NAME
    files = {**manifest.files, TOKENIZER_NAME: FileEntry(path.stat().st_size, file_digest(path))}
    (other / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")
    assert main(["eval", str(tiny_bundle), "--text", str(tmp_path / "t.txt"), "--against", str(other)]) == 1
    assert "cuts the text into other tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --text or --lambada"),
        (["--lambada", "p.jsonl", "--window", "8"], "belong to --text"),
        (["--lambada", "p.jsonl", "--against", "other"], "compares two models on --text"),
        (["--text", "missing.txt"], "cannot be read"),
        (["--text", "{text}", "--window", "64", "--stride", "64"], "the stride must be at least 1 and less"),
    ],
)
def test_impossible_options_are_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    (tmp_path / "t.txt").write_text(TEXT[:600], encoding="utf-8")
    options = [option.format(text=tmp_path / "t.txt") for option in options]
    assert main(["eval", str(tiny_bundle), *options]) == 1
    assert words in capsys.readouterr().err
