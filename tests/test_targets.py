"""Target profiles: edgelm's own load, users' profiles are read strictly, and each mistake is named."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edgelm.runtime.cli import main
from edgelm.targets import (
    Gate,
    Limits,
    Profile,
    TargetError,
    available_targets,
    load_target,
    native_target,
    settings_of,
)

from .conftest import ROOT

PROFILES = sorted((ROOT / "targets").glob("*.toml"))

VALID = """
name = "mine"
description = "A board of my own"
machines = ["riscv64"]
provider = "CPUExecutionProvider"
activations = "float32"
scheme = "int8-rowwise"
weight_bits = 8
opset = 20
[kv]
int8-rowwise = "int8"
int4-rowwise = "int8"
int8-weight = "int8"
int4-weight = "float32"
int8-tensor = "float32"
fp32 = "float32"
[gate]
logit_difference = 1e-4
mean_kl = 0.006
p99_kl = 0.06
perplexity_increase_percent = 3
decided_margin = 0.2
agreement_percent = 97.0
answers_percent = 98
activations_kl = 0.0004
cache_kl = 0.001
cache_kl_limit = 0.01
four_bits_kl = 0.3
[coarse_gate]
mean_kl = 0.1
p99_kl = 1
perplexity_increase_percent = 5
agreement_percent = 90
answers_percent = 80
"""


def refusal(tmp_path: Path, text: str) -> str:
    """The message that refuses a profile with this text."""
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_profile_loads_under_its_own_name() -> None:
    assert available_targets() == [path.stem for path in PROFILES]
    assert {"x86-cpu", "arm-cpu", "cuda"} <= set(available_targets())
    for name in available_targets():
        profile = load_target(name)
        assert profile.name == name
        assert profile.machines == tuple(machine.lower() for machine in profile.machines)


def test_no_machine_is_native_to_two_profiles() -> None:
    machines = [machine for name in available_targets() for machine in load_target(name).machines]
    assert len(machines) == len(set(machines))


def test_a_profile_of_the_users_own_loads_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID, encoding="utf-8")
    profile = load_target(str(path))
    assert profile == Profile(
        name="mine",
        description="A board of my own",
        machines=("riscv64",),
        provider="CPUExecutionProvider",
        activations="float32",
        scheme="int8-rowwise",
        weight_bits=8,
        kv={
            "int8-rowwise": "int8",
            "int4-rowwise": "int8",
            "int8-weight": "int8",
            "int4-weight": "float32",
            "int8-tensor": "float32",
            "fp32": "float32",
        },
        opset=20,
        gate=Gate(
            mean_kl=0.006,
            p99_kl=0.06,
            perplexity_increase_percent=3.0,
            agreement_percent=97.0,
            answers_percent=98.0,
            logit_difference=1e-4,
            decided_margin=0.2,
            activations_kl=0.0004,
            cache_kl=0.001,
            cache_kl_limit=0.01,
            four_bits_kl=0.3,
        ),
        coarse_gate=Limits(0.1, 1.0, 5.0, 90.0, 80.0),
    )
    assert isinstance(profile.gate.perplexity_increase_percent, float)


def test_a_profile_consists_of_its_name_and_settings() -> None:
    profile = load_target("x86-cpu")
    expected = {field.name for field in dataclasses.fields(Profile)} - {"name", "description"}
    assert set(profile.settings()) == expected
    assert profile.settings()["gate"]["logit_difference"] == profile.gate.logit_difference


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("weight_bit = 8\n", "weight_bits"),
        ("shceme = 'fp32'\n", "scheme"),
        ("opsets = 20\n", "opset"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(tmp_path: Path, wrong: str, right: str) -> None:
    message = refusal(tmp_path, wrong + VALID)
    assert f"unknown key {wrong.split(maxsplit=1)[0]}, did you mean {right}?" in message
    assert "mine.toml" in message


def test_an_unknown_key_of_the_gate_is_named_with_its_place(tmp_path: Path) -> None:
    message = refusal(tmp_path, VALID.replace("[gate]\n", "[gate]\ndecided_margins = 0.2\n"))
    assert "unknown key gate.decided_margins, did you mean decided_margin?" in message


def test_an_unknown_scheme_in_the_kv_table_is_named(tmp_path: Path) -> None:
    assert "kv.int4" in refusal(tmp_path, VALID.replace("[gate]", 'int4 = "int8"\n[gate]'))


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Profile) if field.name not in ("kv", "gate", "coarse_gate")]
)
def test_a_missing_key_is_named(tmp_path: Path, field: str) -> None:
    text = re.sub(rf"^{field} = .*\n", "", VALID, flags=re.MULTILINE)
    assert text != VALID
    assert f"key {field} is missing" in refusal(tmp_path, text)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Gate)])
def test_a_missing_key_of_the_gate_is_named_with_its_place(tmp_path: Path, field: str) -> None:
    text = re.sub(rf"^{field} = .*\n", "", VALID, flags=re.MULTILINE)
    assert f"key gate.{field} is missing" in refusal(tmp_path, text)


@pytest.mark.parametrize("table", ["kv", "gate", "coarse_gate"])
def test_a_missing_table_is_named(tmp_path: Path, table: str) -> None:
    text = re.sub(rf"\[{table}\]\n([^\[]*)", "", VALID)
    assert f"key {table} is missing" in refusal(tmp_path, text)


@pytest.mark.parametrize("scheme", ["int8-rowwise", "int8-tensor", "int4-weight", "fp32"])
def test_a_missing_kv_type_is_named(tmp_path: Path, scheme: str) -> None:
    text = re.sub(rf"^{scheme} = .*\n", "", VALID, flags=re.MULTILINE)
    message = refusal(tmp_path, text)
    assert f"kv.{scheme}" in message
    assert "int8, float32" in message


@pytest.mark.parametrize(
    ("good", "bad", "where"),
    [
        ("weight_bits = 8", 'weight_bits = "8"', "weight_bits"),
        ("weight_bits = 8", "weight_bits = true", "weight_bits"),
        ("weight_bits = 8", "weight_bits = 8.0", "weight_bits"),
        ("opset = 20", "opset = [20]", "opset"),
        ('provider = "CPUExecutionProvider"', "provider = 1", "provider"),
        ('machines = ["riscv64"]', 'machines = "riscv64"', "machines"),
        ('machines = ["riscv64"]', "machines = [64]", "machines"),
        ("logit_difference = 1e-4", 'logit_difference = "small"', "gate.logit_difference"),
        ("decided_margin = 0.2", "decided_margin = false", "gate.decided_margin"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_found(
    tmp_path: Path, good: str, bad: str, where: str
) -> None:
    assert good in VALID
    message = refusal(tmp_path, VALID.replace(good, bad))
    assert f"{where} has the wrong type" in message


@pytest.mark.parametrize("table", ["kv", "gate", "coarse_gate"])
def test_a_value_in_place_of_a_table_is_named(tmp_path: Path, table: str) -> None:
    text = f"{table} = 1\n" + re.sub(rf"\[{table}\]\n([^\[]*)", "", VALID)
    assert f"{table} has the wrong type" in refusal(tmp_path, text)


def test_an_unknown_scheme_is_named_with_those_there_are(tmp_path: Path) -> None:
    message = refusal(tmp_path, VALID.replace('scheme = "int8-rowwise"', 'scheme = "int4"'))
    assert "'int4'" in message
    assert "int8-rowwise, int4-rowwise, int8-tensor, int8-weight, int4-weight, fp32" in message


@pytest.mark.parametrize("bits", [0, 4, 6, 9, 16])
def test_weight_bits_are_7_or_8(tmp_path: Path, bits: int) -> None:
    message = refusal(tmp_path, VALID.replace("weight_bits = 8", f"weight_bits = {bits}"))
    assert f"weight_bits must be 7 or 8, found {bits}" in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"mine\.toml is not a file; there is arm-cpu"):
        load_target(str(tmp_path / "mine.toml"))


def test_an_operator_set_that_no_graph_has_is_refused(tmp_path: Path) -> None:
    assert "opset must be 20, which all graphs have, found 7" in refusal(
        tmp_path, VALID.replace("opset = 20", "opset = 7")
    )


def test_weight_bits_of_7_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "narrow.toml"
    path.write_text(VALID.replace("weight_bits = 8", "weight_bits = 7"), encoding="utf-8")
    assert load_target(str(path)).weight_bits == 7


@pytest.mark.parametrize("name", ["", " ", "my board", "my/board", "..", "../board", "Mine", "-x", "m\u00fc", "a\\n"])
def test_names_that_cannot_be_part_of_a_file_name_are_refused(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, VALID.replace('name = "mine"', f'name = "{name}"'))
    assert "name must be of a to z, 0 to 9" in message and "mine.toml" in message


@pytest.mark.parametrize("name", ["m", "mine", "pi-5", "board_2.1", "8core"])
def test_lower_case_letters_digits_and_marks_form_a_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace('name = "mine"', f'name = "{name}"'), encoding="utf-8")
    assert load_target(str(path)).name == name


def test_an_unknown_kv_type_is_named_with_those_there_are(tmp_path: Path) -> None:
    message = refusal(tmp_path, VALID.replace('int8-tensor = "float32"', 'int8-tensor = "float16"'))
    assert "kv.int8-tensor must be one of int8, float32, found 'float16'" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'activations = "float32"': 'activations = "int8"'}, "activations must be float32 or float16, found 'int8'"),
        ({"CPUExecution": "CUDAExecution"}, "CUDAExecutionProvider has no float32 kernel of GroupQueryAttention"),
        (
            {"CPUExecution": "CUDAExecution", '"float32"\nscheme': '"float16"\nscheme'},
            "scheme 'int8-rowwise' goes not with float16 activations: there is int8-weight, int4-weight, fp16",
        ),
        (
            {'"float32"\nscheme = "int8-rowwise"': '"float16"\nscheme = "int4-weight"'},
            "kv.int8-weight must be one of float16, found 'int8'",
        ),
    ],
)
def test_what_a_provider_cannot_compute_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    text = VALID
    for good, bad in changes.items():
        assert good in text
        text = text.replace(good, bad)
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["name = ", "a = 1\na = 2\n", "[gate\n"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert "mine.toml" in message
    assert "TOML" in message


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff\xfe'\n")
    with pytest.raises(TargetError, match=r"mine\.toml"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("name", "near"), [("x86", "x86-cpu"), ("x86_cpu", "x86-cpu"), ("arm", "arm-cpu"), ("arm-cpus", "arm-cpu")]
)
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TargetError, match=re.escape(f"unknown target {name!r}: did you mean {near}?")):
        load_target(name)


@pytest.mark.parametrize("name", ["toaster", "", "../targets/x86-cpu", "no/such/file.toml"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(name)
    assert f"unknown target {name!r}" in str(caught.value)
    assert "x86-cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("x86_64", "x86-cpu"),
        ("AMD64", "x86-cpu"),
        ("aarch64", "arm-cpu"),
        ("arm64", "arm-cpu"),
        ("ARM64", "arm-cpu"),
        ("riscv64", None),
        ("", None),
    ],
)
def test_the_native_target_is_the_one_that_names_the_machine(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert native_target() == name


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_number_of_a_profile_is_preceded_by_its_reason(path: Path) -> None:
    number = re.compile(r"^\w[\w-]* = [-\d.e]+$")
    lines = path.read_text(encoding="utf-8").splitlines()
    numbers = [index for index, line in enumerate(lines) if number.match(line)]
    assert len(numbers) >= 5, path.name
    for index in numbers:
        # Numbers that share a reason may form a block without blank lines.
        first = index
        while number.match(lines[first]):
            first -= 1
        assert lines[first].startswith("# "), f"{path.name}: no comment explains {lines[index]!r}"


EXTENDING = """
extends = "x86-cpu"
name = "kiosk"
# Our answers are short and checked by people.
weight_bits = 7
[gate]
perplexity_increase_percent = 5
"""


def test_a_profile_may_extend_one_that_comes_with_edgelm(tmp_path: Path) -> None:
    path = tmp_path / "kiosk.toml"
    path.write_text(EXTENDING, encoding="utf-8")
    profile, base = load_target(str(path)), load_target("x86-cpu")
    gate = dataclasses.replace(base.gate, perplexity_increase_percent=5.0)
    assert profile == dataclasses.replace(base, name="kiosk", weight_bits=7, gate=gate)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"x86-cpu"', '"x86"'), "extends must be one of arm-cpu"),
        (('"x86-cpu"', "[1]"), "extends must be one of arm-cpu"),
        (('name = "kiosk"', ""), "key name is missing"),
        (("weight_bits", "weight_bit"), "did you mean weight_bits?"),
        (("perplexity_increase_percent", "perplexity_increase"), "did you mean perplexity_increase_percent?"),
        (("[gate]", "[kv]"), "unknown key kv.perplexity_increase_percent"),
    ],
)
def test_a_mistake_in_a_profile_that_extends_is_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert words in refusal(tmp_path, EXTENDING.replace(*change))


@pytest.mark.parametrize("name", available_targets())
def test_every_setting_but_the_description_has_a_reason(name: str) -> None:
    settings = settings_of(name)
    assert {setting.key.split(".")[0] for setting in settings} == {"description", *load_target(name).settings()}
    assert [setting.key for setting in settings if not setting.reason] == ["description"]


def test_reasons_follow_what_a_profile_extends(tmp_path: Path) -> None:
    path = tmp_path / "kiosk.toml"
    path.write_text(EXTENDING, encoding="utf-8")
    found = {setting.key: setting for setting in settings_of(str(path))}
    assert found["weight_bits"].value == 7
    assert found["weight_bits"].reason == "Our answers are short and checked by people."
    assert found["weight_bits"].origin == "kiosk"
    assert found["gate.perplexity_increase_percent"].reason == ""
    assert found["opset"].origin == "x86-cpu"
    assert "onnxruntime" in found["opset"].reason


def test_the_command_explains_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "arm-cpu"]) == 0
    shown = capsys.readouterr().out
    assert "weight_bits = 8" in shown
    assert "do not saturate" in shown
    assert main(["targets", "arm"]) == 1
    assert "did you mean arm-cpu?" in capsys.readouterr().err


def test_int8_uses_integer_products_that_every_core_has(export_tiny: Callable[..., Path]) -> None:
    """MatMulNBits has no fast kernel on cores without dot product instructions, such as the Raspberry Pi 4's."""
    model = onnx.load(export_tiny() / "model.onnx", load_external_data=False)
    operators = {node.op_type for part in (model.graph, *model.functions) for node in part.node}
    assert "MatMulIntegerToFloat" in operators
    assert "MatMulNBits" not in operators


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("mean_kl = 0.006", "mean_kl = 0", "gate.mean_kl must be more than 0"),
        ("p99_kl = 0.06", "p99_kl = -0.1", "gate.p99_kl must be more than 0"),
        (
            "perplexity_increase_percent = 3",
            "perplexity_increase_percent = 0.0",
            "gate.perplexity_increase",
        ),
        ("logit_difference = 1e-4", "logit_difference = 0", "gate.logit_difference must be more than 0"),
        (
            "agreement_percent = 97.0",
            "agreement_percent = 100.5",
            "gate.agreement_percent must be 0 to 100",
        ),
        ("answers_percent = 98", "answers_percent = -1", "gate.answers_percent must be 0 to 100, found -1"),
        ("decided_margin = 0.2", "decided_margin = 2", "gate.decided_margin must be 0 to 1, found 2"),
        ("p99_kl = 1\n", "p99_kl = 0\n", "coarse_gate.p99_kl must be more than 0"),
    ],
)
def test_a_budget_that_nothing_can_meet_is_refused(tmp_path: Path, right: str, wrong: str, words: str) -> None:
    assert right in VALID
    assert words in refusal(tmp_path, VALID.replace(right, wrong))


def test_coarse_schemes_have_limits_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID, encoding="utf-8")
    profile = load_target(str(path))
    assert profile.gate_of("int8-rowwise") == profile.gate
    coarse = profile.gate_of("int4-weight")
    assert (coarse.mean_kl, coarse.agreement_percent) == (0.1, 90.0)
    assert (coarse.logit_difference, coarse.decided_margin) == (1e-4, 0.2)


def test_limits_follow_from_the_bits_of_weights() -> None:
    """By the same factor for each bit, and never beyond those of 4 and 8 bits."""
    gate = load_target("x86-cpu").gate
    assert gate.of_bits(4.25).mean_kl == pytest.approx(gate.four_bits_kl)
    assert gate.of_bits(3) == gate.of_bits(4.25)
    assert gate.of_bits(8).mean_kl == pytest.approx(gate.mean_kl)
    assert gate.of_bits(9) == gate.of_bits(8)
    five, six, seven = (gate.of_bits(bits).mean_kl for bits in (5, 6, 7))
    assert five / six == pytest.approx(six / seven)
    assert gate.of_bits(5).answers_percent < gate.of_bits(6).answers_percent


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_tolerance_that_is_no_finite_number_is_refused(tmp_path: Path, value: str) -> None:
    text = VALID.replace("logit_difference = 1e-4", f"logit_difference = {value}")
    assert "gate.logit_difference must be a finite number" in refusal(tmp_path, text)


def test_the_benchmarks_target_for_random_weights_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script writes it; it is read as strictly as a user's own."""
    if native_target() is None:
        pytest.skip("no target fits this machine")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reference_model

    gate = load_target(str(reference_model.random_target(tmp_path))).gate
    assert gate.mean_kl == 10 and 0 < gate.activations_kl < 1e-9
