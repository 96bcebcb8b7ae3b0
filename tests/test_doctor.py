"""`edgelm doctor` describes the machine and names what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgelm.runtime.cli import main
from edgelm.runtime.commands import diagnosis as doctor
from edgelm.runtime.commands.diagnosis import diagnose
from edgelm.runtime.errors import SessionError
from edgelm.runtime.host import cpuid, machine
from edgelm.runtime.sessions import kernels


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine without GPU, whose instruction sets a test can set."""
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpuid, "instruction_sets", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("processor", "target", "int8"),
    [
        (("x86_64", "flags : fpu avx2 avx512_vnni\n"), "x86-cpu", "fast (VNNI)"),
        (("AMD64", "flags : fpu avx2\n"), "x86-cpu", "slower (no VNNI"),
        (("aarch64", "Features : fp asimd asimddp\n"), "arm-cpu", "fast (dot product)"),
        (("aarch64", "Features : fp asimd\n"), "arm-cpu", "slower (no dot product"),
        (("arm64", None), "arm-cpu", "unknown"),
        (("riscv64", None), None, "unknown"),
    ],
)
def test_target_and_speed_follow_the_processor(
    pretend: pytest.MonkeyPatch, tmp_path: Path, processor: tuple[str, str | None], target: str | None, int8: str
) -> None:
    kind, cpuinfo = processor
    pretend.setattr(platform, "machine", lambda: kind)
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    found = diagnose()
    assert found.target == target
    assert found.int8.startswith(int8)
    assert any("no target" in sentence for sentence in found.advice) == (target is None)


def test_a_gpu_without_its_provider_is_reported(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert any("onnxruntime-gpu" in sentence for sentence in diagnose().advice)


def test_a_gpu_with_its_provider_gets_its_target(pretend: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    fake = SimpleNamespace(__version__="1", get_available_providers=lambda: providers)
    pretend.setattr(doctor, "load_onnxruntime", lambda: fake)
    assert diagnose().target != "cuda", "without a driver the target is not cuda"
    pretend.setattr(doctor, "gpu_names", lambda: ("NVIDIA Test 1",))
    assert diagnose().target == "cuda"


def test_an_unusable_home_is_reported(pretend: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pretend.setenv("EDGELM_HOME", str(tmp_path / "file" / "below"))
    assert any("set EDGELM_HOME" in sentence for sentence in diagnose().advice)


def test_extras_are_found_by_their_packages(pretend: pytest.MonkeyPatch) -> None:
    requirements = ["numpy>=1", 'torch>=2; extra == "export"', 'onnx>=1; extra == "export"', "redis; extra == 'redis'"]
    pretend.setattr(importlib.metadata, "requires", lambda _: requirements)
    pretend.setattr(doctor, "_is_installed", lambda name: name != "onnx")
    found = diagnose()
    assert found.extras == {"export": False, "redis": True}
    assert any("edgelm[export]" in sentence for sentence in found.advice)


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "onnxruntime" in text and "INT8" in text and "GB free" in text
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == machine.default_threads()
    assert 0 < found["available_bytes"] <= found["memory_bytes"]


def test_unusable_kernels_are_reported_with_the_other_findings(
    pretend: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise SessionError("the kernels are damaged: install them again")

    pretend.setattr(kernels, "identity", refuse)
    pretend.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^kernels +installed, but cannot be used$", text, re.MULTILINE)
    assert "onnxruntime" in text and "GB free" in text
    assert text.index("- the kernels are damaged: install them again") < text.index("- there is an NVIDIA driver")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["kernels"], found["kernels_fault"]) == (None, "the kernels are damaged: install them again")


def test_a_machine_without_faults_has_none(pretend: pytest.MonkeyPatch) -> None:
    assert diagnose().kernels_fault is None


@pytest.mark.parametrize(("used", "billions"), [(None, "10.0"), ("kernels 1", "20.0")])
def test_the_largest_model_leaves_room_for_what_loading_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], used: str | None, billions: str
) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 26_000_000_000)
    monkeypatch.setattr(doctor, "_kernels", lambda: (used, None))
    assert main(["doctor"]) == 0
    assert f"up to about {billions} billion parameters" in capsys.readouterr().out
