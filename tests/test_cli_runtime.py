"""The command line of the runtime: exit statuses, output streams, JSON, and never a traceback.

Most tests call `main` in this process. Tests of broken streams start a process of their own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Stats, cli, load
from edgelm.runtime.bundle.folder import file_digest
from edgelm.runtime.cli import main

from .conftest import ROOT, TEXT

PARSERS = {name: cli.make_parser(name, cli._find(name)) for name in cli._names()}
# Commands that need one bundle.
OF_A_BUNDLE = [
    name
    for name, parser in PARSERS.items()
    if any(action.dest == "bundle" and action.nargs is None for action in parser._actions)
]
Captured = pytest.CaptureFixture[str]


def call(*arguments: str | Path) -> int:
    """The exit status, whether `main` returns it or argparse exits with it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def refused(capsys: Captured, *arguments: str | Path) -> str:
    """Run a command that must fail; returns its one-line error."""
    capsys.readouterr()
    assert call(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgelm: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def process(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgelm.runtime.cli", *map(str, arguments)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **settings}
    return subprocess.run(command, check=False, **settings)


def answer(bundle: Path, prompt: str, max_tokens: int) -> str:
    with load(bundle) as engine:
        return engine.generate(prompt, max_tokens=max_tokens).text


class Stdin(io.TextIOWrapper):
    """Standard input with the given bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


# ---- the program itself


def test_help_lists_every_command(capsys: Captured) -> None:
    assert call("--help") == 0
    out, err = capsys.readouterr()
    listed = [line.split()[0] for line in out.partition("commands:")[2].splitlines() if line.strip()]
    files = [path for package in ("runtime", "export") for path in (ROOT / package / "commands").glob("*.py")]
    assert listed == sorted(path.stem for path in files if "\nSUMMARY = " in path.read_text(encoding="utf-8"))
    assert {"bench", "chat", "export", "inspect", "run", "serve", "verify"} <= set(listed)
    assert err == ""


def test_without_arguments_help_is_printed(capsys: Captured) -> None:
    assert call() == 0
    assert "commands:" in capsys.readouterr().out


def test_the_version_is_the_distributions(capsys: Captured) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"edgelm {importlib.metadata.version('edgelm')}\n"


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_has_help_that_names_its_arguments(command: str, capsys: Captured) -> None:
    assert call(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: edgelm {command}" in out and "--debug" in out
    for action in PARSERS[command]._actions:
        assert all(option in out for option in action.option_strings)
        assert action.help


def test_these_commands_need_a_bundle() -> None:
    """Tests below are repeated for each of them."""
    assert {"bench", "chat", "inspect", "run", "verify"} <= set(OF_A_BUNDLE)


# A conversation and a server print no result.
@pytest.mark.parametrize("command", sorted(PARSERS.keys() - {"chat", "serve"}))
def test_each_command_can_print_its_result_as_json(command: str) -> None:
    assert "--json" in PARSERS[command]._option_string_actions


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        [""],
        ["--no-such-option"],
        ["run"],
        ["run", "bundle", "prompt", "more"],
        ["run", "bundle", "--max-tokens", "many"],
        ["inspect", "bundle", "--no-such-option"],
        ["bench", "bundle", "--context"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_says_so_on_standard_error(arguments: list[str], capsys: Captured) -> None:
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "edgelm" in err and "Traceback" not in err


def test_an_unknown_command_is_answered_with_the_known_ones(capsys: Captured) -> None:
    assert call("dance") == 2
    err = capsys.readouterr().err
    assert "'dance'" in err
    assert all(command in err for command in PARSERS)


@pytest.mark.parametrize("command", OF_A_BUNDLE)
def test_a_missing_bundle_is_one_line_of_error(command: str, tmp_path: Path, capsys: Captured) -> None:
    prompt = ["hello"] if command == "run" else []
    assert str(tmp_path / "absent") in refused(capsys, command, tmp_path / "absent", *prompt)
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refused(capsys, command, tmp_path / "empty", *prompt)


def test_a_traceback_is_shown_only_with_debug(tmp_path: Path, capsys: Captured) -> None:
    refused(capsys, "inspect", tmp_path / "absent")
    absent = str(tmp_path / "absent")
    for arguments in (["inspect", absent, "--debug"], ["--debug", "inspect", absent]):
        assert call(*arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and "BundleMissingError" in err
        assert err.splitlines()[-1].startswith("edgelm: error: ")


@pytest.mark.parametrize("command", OF_A_BUNDLE)
def test_an_interrupt_is_status_130(
    command: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgelm.runtime.bundle.folder.Bundle.open", interrupt)
    assert call(command, tiny_bundle, *(["hello"] if command == "run" else [])) == 130
    assert capsys.readouterr().err == "edgelm: interrupted\n"


@pytest.mark.parametrize("module", ["edgelm.runtime.cli", "argparse", "edgelm.runtime.commands.run"])
def test_an_interrupt_while_modules_are_imported_is_status_130_too(module: str) -> None:
    program = f"""
import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
sys.modules.pop({module!r}, None)
sys.argv = ["edgelm", "run", "bundle", "hello"]
from edgelm.runtime.program import main
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "edgelm: interrupted\n")


# ---- run


def test_run_prints_the_answer_and_nothing_else(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("run", tiny_bundle, "Once upon", "--max-tokens", "12") == 0
    out, err = capsys.readouterr()
    assert out == answer(tiny_bundle, "Once upon", 12) + "\n"
    assert err == ""


def test_run_with_json_prints_the_completion(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("run", tiny_bundle, "Once upon", "--max-tokens", "12", "--json") == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert err == ""
    assert set(data) == {"text", "token_ids", "finish_reason", "stats"}
    assert set(data["stats"]) == {field.name for field in dataclasses.fields(Stats)}
    assert data["text"] == answer(tiny_bundle, "Once upon", 12)
    assert data["stats"]["prompt_tokens"] == 9
    assert data["stats"]["generated_tokens"] == len(data["token_ids"])
    assert data["finish_reason"] in ("stop", "length")


def test_run_reports_draft_tokens_and_makes_none_without_lookup(tiny_bundle: Path, capsys: Captured) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    command = ["run", tiny_bundle, "abcd" * 20, "--regex", "(abcd){20,30}", "--max-tokens", "60", "--no-response-cache"]
    assert call(*command, "--stats") == 0
    out, err = capsys.readouterr()
    assert re.search(r"\b[1-9]\d* of \d+ draft tokens accepted", err)
    assert call(*command, "--stats", "--no-lookup") == 0
    plain, err = capsys.readouterr()
    assert plain == out and "draft tokens" not in err
    assert call(*command, "--json", "--no-lookup") == 0
    assert json.loads(capsys.readouterr().out)["stats"]["guessed_tokens"] == 0


def test_run_with_stats_keeps_standard_output_clean(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("run", tiny_bundle, "Once upon", "--max-tokens", "12", "--stats", "--threads", "1") == 0
    out, err = capsys.readouterr()
    assert out == answer(tiny_bundle, "Once upon", 12) + "\n"
    assert "9 prompt tokens" in err and err.count("\n") == 1


@pytest.mark.parametrize("given", [[], ["-"]])
@pytest.mark.parametrize("data", ["Once upon", "Once upon\n", "Once upon\r\n", "\ufeffOnce upon\r\n"])
def test_run_reads_the_prompt_from_standard_input(
    tiny_bundle: Path, given: list[str], data: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data.encode()))
    assert call("run", tiny_bundle, *given, "--max-tokens", "12") == 0
    assert capsys.readouterr().out == answer(tiny_bundle, "Once upon", 12) + "\n"


@pytest.mark.parametrize(("data", "prompt"), [("a\r\n\r\n", "a\r\n"), ("a\r", "a\r"), ("a\n\r\n", "a\n")])
def test_one_line_end_and_no_more_is_taken_from_standard_input(
    tiny_bundle: Path, data: str, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data.encode()))
    assert call("run", tiny_bundle, "--max-tokens", "1", "--json") == 0
    with load(tiny_bundle, response_cache=False) as engine:
        assert json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"] == len(engine.encode(prompt))


def test_run_answers_each_line_of_a_file(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    lines = ["Once upon", "a \u2028 b", "The", "Once upon"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    options = ["--prompts", file, "--max-rows", "2", "--max-tokens", "6", "--logprobs", "1", "--stats"]
    assert call("run", tiny_bundle, *options) == 0
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    with load(tiny_bundle, response_cache=False) as engine:
        alone = [engine.generate(line, max_tokens=6, logprobs=1) for line in lines]
    assert [one["text"] for one in answers] == [one.text for one in alone]
    assert [one["token_ids"] for one in answers] == [list(one.token_ids) for one in alone]
    assert all(len(one["logprobs"]) == len(one["token_ids"]) for one in answers)
    assert printed.err.startswith("4 answers, ")


def test_lines_of_standard_input_are_prompts_too(tiny_bundle: Path) -> None:
    done = process("run", tiny_bundle, "--prompts", "-", "--max-tokens", "2", input=b"Once\nThe\n")
    assert len(done.stdout.splitlines()) == 2
    assert process("run", tiny_bundle, "--prompts", "-", input=b"").stdout == b""


def test_prompts_of_a_file_that_cannot_be_answered_are_one_line(
    tiny_bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a\n\nb\n")
    assert "prompt 1 of the batch: the prompt is empty" in refused(capsys, "run", tiny_bundle, "--prompts", file)
    assert "give one of them" in refused(capsys, "run", tiny_bundle, "a", "--prompts", file)
    assert "--max-rows belongs to --prompts" in refused(capsys, "run", tiny_bundle, "a", "--max-rows", "2")
    assert "max_rows must be" in refused(capsys, "run", tiny_bundle, "--prompts", file, "--max-rows", "0")
    assert "the system refused" in refused(capsys, "run", tiny_bundle, "--prompts", tmp_path / "missing")
    assert "no file has such a name" in refused(capsys, "run", tiny_bundle, "--prompts", "a\0b")
    file.write_bytes(b"\xff\n")
    assert "is not UTF-8 text" in refused(capsys, "run", tiny_bundle, "--prompts", file)


@pytest.mark.skipif(sys.platform == "win32", reason="file names may hold it there")
@pytest.mark.parametrize(
    "words", ["run BUNDLE --prompts", "serve BUNDLE --unix", "export builtin:tales --out", "eval BUNDLE --text"]
)
def test_half_of_a_surrogate_pair_is_refused(words: str, tiny_bundle: Path, capsys: Captured) -> None:
    given = [str(tiny_bundle) if word == "BUNDLE" else word for word in words.split()]
    assert "half of a surrogate pair" in refused(capsys, *given, "half \ud83d")


def test_options_may_stand_before_between_and_after(tiny_bundle: Path, capsys: Captured) -> None:
    option = ["--max-tokens", "3"]
    for arguments in (
        [*option, str(tiny_bundle), "hello"],
        [str(tiny_bundle), *option, "hello"],
        [str(tiny_bundle), "hello", *option],
    ):
        assert call("run", *arguments) == 0
        assert capsys.readouterr().out == answer(tiny_bundle, "hello", 3) + "\n"


def test_a_prompt_may_begin_with_a_dash(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("run", "--max-tokens", "3", tiny_bundle, "--", "-5 degrees") == 0
    assert capsys.readouterr().out == answer(tiny_bundle, "-5 degrees", 3) + "\n"


def test_the_prompt_may_be_the_commands_name(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("--debug", "run", tiny_bundle, "run", "--max-tokens", "3") == 0
    assert capsys.readouterr().out == answer(tiny_bundle, "run", 3) + "\n"


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_an_empty_prompt_is_refused(
    tiny_bundle: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert "empty" in refused(capsys, "run", tiny_bundle, "")
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert "empty" in refused(capsys, "run", tiny_bundle)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hello", "--max-tokens", "0"], "max_tokens"),
        (["hello", "--max-tokens", "-3"], "-3"),
        (["hello", "--threads", "0"], "threads"),
        (["word " * 200], "1,000 tokens"),
        (["half \udcff"], "Unicode"),
        (["hello", "--chat"], "chat template"),
        (["hello", "--system", "be brief"], "chat template"),
    ],
    ids=["no tokens", "negative", "no threads", "too long", "surrogate", "chat", "system"],
)
def test_requests_that_cannot_be_met_are_one_line(
    tiny_bundle: Path, arguments: list[str], words: str, capsys: Captured
) -> None:
    assert words in refused(capsys, "run", tiny_bundle, *arguments)


def test_chat_and_system_go_through_the_bundles_template(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    bundle = with_template(tiny_bundle, tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    for arguments, prompt in (
        ([], "user:hello;"),
        (["--raw"], "hello"),
        (["--chat"], "user:hello;"),
        (["--system", "be brief"], "system:be brief;user:hello;"),
        (["--system", "", "--chat"], "system:;user:hello;"),
    ):
        assert call("run", bundle, "hello", "--max-tokens", "6", *arguments) == 0
        assert capsys.readouterr().out == answer(tiny_bundle, prompt, 6) + "\n"


def test_lines_of_a_file_go_through_the_bundles_template(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    bundle = with_template(tiny_bundle, tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    (tmp_path / "lines").write_text("hello\n", encoding="utf-8")
    for arguments, prompt in (([], "user:hello;"), (["--raw"], "hello")):
        assert call("run", bundle, "--prompts", tmp_path / "lines", "--max-tokens", "6", *arguments) == 0
        assert json.loads(capsys.readouterr().out)["text"] == answer(tiny_bundle, prompt, 6)


def test_an_empty_prompt_is_refused_as_a_message(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    assert "empty" in refused(capsys, "run", with_template(tiny_bundle, tmp_path, "asked"), "")


CONTINUED = """{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}
{%- if tools %}{{ tools | tojson }}{% endif %}{{ documents }}{{ mood }}"""


def test_run_passes_options_to_the_template(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    bundle = with_template(tiny_bundle, tmp_path, CONTINUED)
    tools, documents = tmp_path / "tools.json", tmp_path / "documents.json"
    tools.write_text('[{"type": "function"}]', encoding="utf-8")
    documents.write_text('[{"text": "é"}]', encoding="utf-8")
    asked = "user:hello;assistant:"
    for arguments, prompt in (
        (["--tools", tools], f'{asked}[{{"type": "function"}}]None'),
        (["--documents", documents], f"{asked}[{{'text': 'é'}}]"),
        (["--template-variable", "mood=true"], f"{asked}NoneTrue"),
        (["--template-variable", "mood=x=y"], f"{asked}Nonex=y"),
        (["--begin", "Well, "], "user:hello;assistant:Well, "),
    ):
        assert call("run", bundle, "hello", "--max-tokens", "6", *arguments) == 0
        assert capsys.readouterr().out == answer(tiny_bundle, prompt, 6) + "\n"
        (tmp_path / "lines").write_text("hello\n", encoding="utf-8")
        assert call("run", bundle, "--prompts", tmp_path / "lines", "--max-tokens", "6", *arguments) == 0
        assert json.loads(capsys.readouterr().out)["text"] == answer(tiny_bundle, prompt, 6)
    assert call("run", bundle, "a<end>", "--max-tokens", "6", "--tokens-in-messages") == 0
    assert capsys.readouterr().out == answer(tiny_bundle, "user:a<end>;assistant:None", 6) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tools", "no-such-file"], "cannot be read"),
        (["--tools", "BROKEN"], "is not JSON"),
        (["--documents", "NUMBER"], "documents must be a list of objects"),
        (["--template-variable", "hope=1"], "reads no variable 'hope'"),
    ],
)
def test_options_for_messages_that_cannot_be_met_are_one_line(
    tiny_bundle: Path, tmp_path: Path, arguments: list[str], words: str, capsys: Captured
) -> None:
    bundle = with_template(tiny_bundle, tmp_path, CONTINUED)
    (tmp_path / "BROKEN").write_text("[", encoding="utf-8")
    (tmp_path / "NUMBER").write_text("5", encoding="utf-8")
    given = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    assert words in refused(capsys, "run", bundle, "hello", *given)


@pytest.mark.parametrize(
    "other", [["--chat"], ["--system", "be brief"], ["--begin", "a"], ["--template-variable", "a=1"]]
)
def test_raw_excludes_options_that_need_a_template(tiny_bundle: Path, other: list[str], capsys: Captured) -> None:
    assert "give one of them" in refused(capsys, "run", tiny_bundle, "hello", "--raw", *other)


def test_a_template_that_refuses_is_one_line(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    bundle = with_template(tiny_bundle, tmp_path, "{{ raise_exception('only in verse\\nplease') }}")
    assert "only in verse" in refused(capsys, "run", bundle, "hello", "--chat")


def with_template(source: Path, folder: Path, template: str) -> Path:
    bundle = Path(shutil.copytree(source, folder / "bundle"))
    path = bundle / "chat_template.jinja"
    path.write_text(template, encoding="utf-8")
    entry = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    edit_manifest(bundle, lambda data: data["files"].update({path.name: entry}))
    return bundle


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


# ---- inspect, verify, bench


def test_inspect_with_json_is_the_manifest_and_the_digest(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("inspect", tiny_bundle, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    manifest = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    assert data.pop("digest").startswith("sha256:")
    assert data == manifest


def test_inspect_shows_the_main_facts(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("inspect", tiny_bundle) == 0
    out = capsys.readouterr().out
    for words in (
        "int8-rowwise",
        "x86-cpu",
        "2 x 2 KV heads of 16",
        "512 tokens",
        "128 bytes a token",
        "model.onnx.data",
    ):
        assert words in out


@pytest.mark.parametrize("quality", [{}, {"against_fp32": {}}, {"against_fp32": {"other": 1}}, {"against_fp32": None}])
def test_inspect_survives_whatever_the_exporter_measured(
    tiny_bundle: Path, tmp_path: Path, quality: dict[str, Any], capsys: Captured
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    edit_manifest(bundle, lambda data: data.update(quality=quality))
    assert call("inspect", bundle) == 0
    assert "int8-rowwise" in capsys.readouterr().out


def test_verify_confirms_exactness_under_cuts(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:600], encoding="utf-8")
    assert call("verify", tiny_bundle, "--json", "--text", text) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"digest", "files", "cut_difference", "perplexity", "exact_under_cuts"}
    assert data["exact_under_cuts"] is True
    assert data["cut_difference"] == 0
    assert set(data["perplexity"]) == {"value", "tokens", "window", "stride"}
    assert data["perplexity"]["tokens"] == 599
    assert data["perplexity"]["value"] > 1
    assert call("verify", tiny_bundle) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_verify_fails_if_cuts_change_the_logits(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("edgelm.runtime.commands.verify.cut_difference", lambda *_: 0.25)
    assert "0.25" in refused(capsys, "verify", tiny_bundle)
    assert "0.25" in refused(capsys, "verify", tiny_bundle, "--json")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"a\xff", "byte 1"), (b"", "two tokens"), (b"a", "two tokens")]
)
def test_verify_refuses_texts_that_cannot_be_scored(
    tiny_bundle: Path, tmp_path: Path, content: bytes | None, words: str, capsys: Captured
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert words in refused(capsys, "verify", tiny_bundle, "--text", tmp_path / "text.txt")


def test_verify_sees_a_changed_file(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    weights = bytearray((bundle / "model.onnx.data").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.onnx.data").write_bytes(weights)
    assert "model.onnx.data" in refused(capsys, "verify", bundle)


def test_bench_with_json_measures_each_length(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("bench", tiny_bundle, "--json", "--context", "8", "300", "511", "--repeats", "1", "--threads", "1") == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"load_s", "resident_bytes", "bundle_bytes", "threads", "speed"}
    assert data["threads"] == 1
    assert data["bundle_bytes"] == sum(
        path.stat().st_size for path in tiny_bundle.iterdir() if path.name != "manifest.json"
    )
    assert [speed["prompt_tokens"] for speed in data["speed"]] == [8, 300, 511]
    for speed in data["speed"]:
        assert set(speed) == {"prompt_tokens", "prefill_s", "step_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
        assert all(value > 0 for value in speed.values())


def test_bench_prints_a_row_for_each_length(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("bench", tiny_bundle, "--repeats", "1") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["128"], "1024 and 1900 do not fit into this bundle's context"


@pytest.mark.parametrize(
    "arguments", [["--context", "0"], ["--context", "512"], ["--context", "8", "-1"], ["--repeats", "0"]]
)
def test_bench_refuses_what_it_cannot_measure(tiny_bundle: Path, arguments: list[str], capsys: Captured) -> None:
    assert arguments[0] in refused(capsys, "bench", tiny_bundle, *arguments)


# ---- streams of a separate process


def check_one_line(done: subprocess.CompletedProcess[bytes], words: str) -> None:
    err = done.stderr.decode()
    assert done.returncode == 1, err
    assert err.startswith("edgelm: error: ") and err.count("\n") == 1, err
    assert words in err


def test_a_process_answers_and_exits_with_0(tiny_bundle: Path) -> None:
    done = process("run", tiny_bundle, "--max-tokens", "12", input=b"Once upon")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == answer(tiny_bundle, "Once upon", 12) + os.linesep


def test_standard_input_that_is_no_text_is_refused(tiny_bundle: Path) -> None:
    check_one_line(process("run", tiny_bundle, input=b"caf\xe9"), "byte 3")


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_broken_pipe_is_one_line(tiny_bundle: Path, command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process(command, tiny_bundle, *(["Once"] if command == "run" else []), stdout=writing)
    finally:
        os.close(writing)
    check_one_line(done, "output was closed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
# Python writes at once, or when its buffer is full and at exit. argparse itself ignores the first of these errors.
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["inspect", "BUNDLE"], ""),
        (["inspect", "BUNDLE"], "1"),
        (["doctor"], ""),
        (["doctor"], "1"),
        (["--help"], ""),
        (["run", "--help"], ""),
        (["--version"], ""),
    ],
)
def test_a_full_disk_is_one_line(tiny_bundle: Path, arguments: list[str], unbuffered: str) -> None:
    words = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    with Path("/dev/full").open("wb") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        check_one_line(process(*words, stdout=full, env=environment), "No space left")


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors with a POSIX shell")
@pytest.mark.parametrize(("arguments", "closed"), [(["run", "Once"], "1"), (["inspect"], "1"), (["run"], "0")])
def test_streams_that_were_never_open_give_no_traceback(tiny_bundle: Path, arguments: list[str], closed: str) -> None:
    command, *more = arguments
    redirect = ">&-" if closed == "1" else "<&-"
    program = [sys.executable, "-m", "edgelm.runtime.cli", command, str(tiny_bundle), *more]
    shell = ["/bin/sh", "-c", f'"$@" {redirect}', "sh", *program]
    done = subprocess.run(shell, stderr=subprocess.PIPE, check=False, timeout=120)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1
    assert done.returncode == 1
    assert (b"standard output is closed" if closed == "1" else b"empty") in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locales and signals")
def test_an_argument_that_is_not_ascii_is_read_in_every_locale(tiny_bundle: Path) -> None:
    prompt = "Zażółć 你好"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "edgelm.runtime.cli", "run", str(tiny_bundle), prompt, "--max-tokens", "6"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with load(tiny_bundle) as engine:
        expected = engine.generate(prompt, max_tokens=6).text
    assert done.stdout == (expected + "\n").encode("ascii", "backslashreplace")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locales and signals")
def test_a_terminated_program_removes_partial_output(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from edgelm.export.output.place import partial_folder
from edgelm.runtime import cli
from edgelm.runtime.commands import doctor
def half(_):
    with partial_folder(Path({str(tmp_path / "out")!r})) as folder:
        (folder / "graph").write_text("half")
        print("begun", flush=True)
        time.sleep(60)
doctor.run = half
sys.argv = ["edgelm", "doctor"]
sys.exit(cli.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"begun\n"
    assert list(tmp_path.iterdir())
    process.terminate()
    assert process.wait(60) == 143
    assert process.stderr.read() == b"edgelm: terminated\n"
    assert not list(tmp_path.iterdir())
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_output_that_cannot_hold_the_answer_gives_no_traceback(
    tiny_bundle: Path, tmp_path: Path, encoding: str
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    edit_manifest(bundle, lambda data: data.update(name="małe 模型"))
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (
        ["inspect", str(bundle)],
        ["inspect", str(bundle), "--json"],
        ["run", str(bundle), "Once", "--max-tokens", "40"],
    ):
        done = process(*arguments, env=environment)
        assert b"Traceback" not in done.stderr
        assert done.returncode in (0, 1)
        assert done.stderr.count(b"\n") == done.returncode


def test_the_module_runs_without_the_exporters_packages(tiny_bundle: Path) -> None:
    code = (
        "import sys; from edgelm.runtime.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    for arguments in (["run", str(tiny_bundle), "a", "--max-tokens", "2"], ["inspect", str(tiny_bundle)], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False, timeout=120)
        assert b"AssertionError" not in done.stderr, done.stderr.decode()
        assert done.returncode == 0, done.stderr.decode()


# ---- generation settings


def test_run_takes_the_settings_as_options(tiny_bundle: Path, capsys: Captured) -> None:
    options = ["--max-tokens", "12", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.01"]
    options += ["--seed", "7", "--repetition-penalty", "1.1", "--presence-penalty", "0.1", "--frequency-penalty", "0.2"]
    options += ["--min-tokens", "3", "--context-full", "slide", "--keep", "2", "--timeout", "60"]
    assert call("run", tiny_bundle, "Once", *options) == 0
    with load(tiny_bundle) as engine:
        done = engine.generate(
            "Once", max_tokens=12, temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, seed=7, repetition_penalty=1.1,
            presence_penalty=0.1, frequency_penalty=0.2, min_tokens=3, context_full="slide", keep=2,
        )  # fmt: skip
    assert capsys.readouterr().out == done.text + "\n"


def test_run_ends_in_front_of_a_stop_text(tiny_bundle: Path, capsys: Captured) -> None:
    with load(tiny_bundle) as engine:
        text = engine.generate("Once upon", max_tokens=40, temperature=5, seed=1).text
    stop, options = text[5:7], ["--max-tokens", "40", "--temperature", "5", "--seed", "1"]
    assert len(stop) == 2
    assert call("run", tiny_bundle, "Once upon", *options, "--stop", stop, "--stop", "zzzzzz") == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_run_bans_and_stops_by_token(tiny_bundle: Path, capsys: Captured) -> None:
    def ids(*options: object) -> list[int]:
        assert call("run", tiny_bundle, "Once", "--max-tokens", "12", "--json", *options) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return found

    plain = ids()
    banned = ids(f"--logit-bias={plain[0]}=-inf")
    assert plain[0] not in banned and len(banned) == len(plain)
    assert set(ids(f"--logit-bias={plain[0]}=1000", "--logit-bias=3=0")) == {plain[0]}
    stop = plain[5]
    assert ids("--stop-token-id", stop, "--stop-token-id", "1") == plain[: plain.index(stop)]
    assert call("run", tiny_bundle, "Once", "--logit-bias", "five") == 2


def test_run_reports_log_probabilities_as_json(tiny_bundle: Path, capsys: Captured) -> None:
    assert call("run", tiny_bundle, "Once", "--max-tokens", "4", "--json", "--logprobs", "2") == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["token_id"] for entry in data["logprobs"]] == data["token_ids"]
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in data["logprobs"])
    assert "--json" in refused(capsys, "run", tiny_bundle, "Once", "--logprobs", "2")


def test_run_follows_a_schema_an_expression_or_a_grammar(tiny_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], '
                      '"additionalProperties": false}', encoding="utf-8")  # fmt: skip
    assert call("run", tiny_bundle, "Once", "--json-schema", schema, "--max-tokens", "200") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["ok"]
    assert call("run", tiny_bundle, "Once", "--regex", "[0-9]{3}") == 0
    assert capsys.readouterr().out.strip().isdigit()
    grammar = tmp_path / "moves.lark"
    grammar.write_text('start: move (" " move)~2\nmove: "left" | "right"\n', encoding="utf-8")
    assert call("run", tiny_bundle, "Once", "--lark", grammar) == 0
    assert re.fullmatch("(left|right)( (left|right)){2}\n", capsys.readouterr().out)
    schema.write_text("{", encoding="utf-8")
    assert "json_schema is not JSON" in refused(capsys, "run", tiny_bundle, "Once", "--json-schema", schema)
    grammar.write_text("start: (", encoding="utf-8")
    assert "lark cannot be used" in refused(capsys, "run", tiny_bundle, "Once", "--lark", grammar)
    for option, content in (("--json-schema", "schema"), ("--lark", "grammar")):
        absent = tmp_path / "absent"
        assert f"the {content} {absent} cannot be read" in refused(capsys, "run", tiny_bundle, "Once", option, absent)


@pytest.mark.parametrize(
    "options",
    ["--temperature -1", "--temperature nan", "--top-p 0.5", "--stop ", "--keep 5", "--seed -4", "--logprobs -1"],
)
def test_run_refuses_invalid_settings(tiny_bundle: Path, options: str, capsys: Captured) -> None:
    option, value = options.split(" ")
    assert option.removeprefix("--").replace("-", " ").split()[0] in refused(
        capsys, "run", tiny_bundle, "Once", option, value
    )
