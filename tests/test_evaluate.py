"""`edgelm eval`: perplexity and last words, the same for a model and for its bundle."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edgelm.export.torch_session import open_model
from edgelm.runtime.bundle import TOKENIZER_NAME
from edgelm.runtime.cli import main
from edgelm.runtime.commands import eval as eval_command
from edgelm.runtime.errors import PromptError, SettingsError
from edgelm.runtime.evaluate import last_words, read_passages, text_perplexity
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.session import open_folder
from edgelm.runtime.tokenizer import Tokenizer

from .conftest import ROOT, TEXT, byte_tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PASSAGE = "the cat sat on the mat"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    byte_tokenizer(tmp_path)
    return Tokenizer(tmp_path / TOKENIZER_NAME)


def knowing(tokenizer: Tokenizer, *texts: str) -> FakeSession:
    """A session that goes on with these texts where it reads the beginning of one."""
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


def test_last_words_are_those_that_are_said(tokenizer: Tokenizer) -> None:
    others = [PASSAGE, "the cat sat on the dog", "a word", "one two three"]
    found = last_words(knowing(tokenizer, PASSAGE, "one two three"), tokenizer, others, 512)
    assert (found.accuracy, found.passages) == (0.5, 4)


def test_a_word_that_is_begun_right_is_not_said(tokenizer: Tokenizer) -> None:
    """Each token counts, the blank too, and each after the true ones before it."""
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
def test_a_file_that_is_no_json_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match="line 3 is no JSON object with the key text"):
        read_passages(tmp_path / "p.jsonl")


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
        and lines[1] == "last words     0.00 % of 1 passages"
    )


def test_the_command_takes_a_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what pyproject.toml declares, be it installed or not; without it the message says what is missing."""
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --text or --lambada"),
        (["--lambada", "p.jsonl", "--window", "8"], "belong to --text"),
        (["--text", "missing.txt"], "cannot be read"),
        (["--text", "{text}", "--window", "64", "--stride", "64"], "the stride must be at least 1 and less"),
    ],
)
def test_options_that_cannot_be(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    (tmp_path / "t.txt").write_text(TEXT[:600], encoding="utf-8")
    options = [option.format(text=tmp_path / "t.txt") for option in options]
    assert main(["eval", str(tiny_bundle), *options]) == 1
    assert words in capsys.readouterr().err
