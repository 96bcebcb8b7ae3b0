"""Wheels built by scripts/build_kernel_wheels.py: correct for their platforms, same bits as kernels compiled on this
machine, and usable without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from edgelm.runtime.sessions import kernels
from edgelm.runtime.sessions.protocol import KERNELS_PIECE_TOKENS

from .conftest import ROOT, missing
from .test_kernels import RUNNER, cases, digests, edgelm_kernels, variants

building = pytest.importorskip("scripts.wheels.build", reason="scripts/ is missing")
platforms = pytest.importorskip("scripts.wheels.platforms")

__all__ = ["cases"]  # a fixture
DIST = building.FOLDER / "dist"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")


def wheel(platform: str) -> Path:
    """The kernel wheel for a platform. Only a release builds all of them, because it takes too long for every run."""
    found = list(DIST.glob(f"edgelm_kernels-*-{platforms.PLATFORMS[platform].tag}.whl"))
    if not found:
        pytest.skip("no wheels: python scripts/build_kernel_wheels.py builds them")
    return found[0]


def unpacked(platform: str, folder: Path) -> Path:
    """The library in a wheel."""
    with zipfile.ZipFile(wheel(platform)) as archive:
        archive.extractall(folder)
    return folder / "edgelm_kernels" / platforms.PLATFORMS[platform].library


def check(*wheels: Path) -> subprocess.CompletedProcess[str]:
    """Run `binaries.py` on wheels."""
    words = [str(building.tools()), str(building.CHECK), *map(str, wheels)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_every_platform_has_a_correct_wheel() -> None:
    done = check(*(wheel(platform) for platform in platforms.PLATFORMS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": checked") == len(platforms.PLATFORMS)


def test_a_wheel_with_a_wrong_library_is_detected(tmp_path: Path) -> None:
    """The library compiled by GCC here needs its own C++ library, and it is for one machine only."""
    here = edgelm_kernels.library()
    for platform, words in (("linux-x86_64", "libstdc++"), ("linux-aarch64", "compiled for elf x86_64")):
        made = tmp_path / wheel(platform).name
        with zipfile.ZipFile(wheel(platform)) as right, zipfile.ZipFile(made, "w") as wrong:
            for name in right.namelist():
                library = name == f"edgelm_kernels/{platforms.PLATFORMS[platform].library}"
                wrong.writestr(name, here.read_bytes() if library else right.read(name))
        done = check(made)
        assert done.returncode == 1
        assert words in done.stdout and "digest" in done.stdout


@pytest.mark.parametrize("name", variants())
def test_this_machines_wheel_has_the_bits_of_locally_compiled_kernels(name: str, cases: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(RUNNER)]
    library = unpacked("linux-x86_64", tmp_path)
    assert digests(command, cases, library, name) == digests(command, cases, edgelm_kernels.library(), name)


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_a_raspberry_pi_gets_the_same_bits_from_its_wheel(cpu: str, cases: Path, tmp_path: Path) -> None:
    machines = pytest.importorskip("scripts.emulated.machines")
    if not machines.is_ready():
        missing("no emulated machines: scripts/arm_check.sh --prepare downloads QEMU and arm64 Debian")
    emulated = digests(machines.command(cpu, str(RUNNER)), cases, unpacked("linux-aarch64", tmp_path))
    assert emulated == digests([sys.executable, str(RUNNER)], cases, edgelm_kernels.library())


def test_an_installation_without_a_compiler_computes_with_kernels(tiny_bundle: Path, tmp_path: Path) -> None:
    """Installs edgelm and kernels from the folder of wheels, the rest from the package index, in tested versions."""
    wheel("linux-x86_64")
    (edgelm,) = DIST.glob("edgelm-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_folder = tmp_path / "venv" / "bin"
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", kernels.SWITCH)}
    environment["PATH"] = str(bin_folder)

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(bin_folder / words[0]), *words[1:]], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert not any((Path(folder) / name).exists() for name in COMPILERS for folder in environment["PATH"].split(":"))
    options = ("--quiet", "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt"), "--find-links", str(DIST))
    run("python", "-m", "pip", "install", *options, str(edgelm))
    assert "edgelm-kernels" in run("edgelm", "doctor")
    run("edgelm", "run", str(tiny_bundle), "Once", "--max-tokens", "4")
    code = "import sys; from edgelm.runtime import load; print(load(sys.argv[1])._session.capabilities.piece_tokens)"
    assert int(run("python", "-c", code, str(tiny_bundle))) == KERNELS_PIECE_TOKENS


def test_edgelms_wheel_requires_its_kernels_where_they_exist() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    asked = packaging.Requirement(building.requirement())
    projects = [ROOT / "kernels" / "pyproject.toml", ROOT / "pyproject.toml"]
    versions = {tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"] for path in projects}
    assert versions == {str(asked.specifier).removeprefix("==")}, "kernels of another version would not be replaced"
    for platform in platforms.PLATFORMS.values():
        system, machine = platform.python
        assert asked.marker.evaluate({"sys_platform": system, "platform_machine": machine})
    for system, machine in (("linux", "armv7l"), ("linux", "riscv64"), ("win32", "ARM64"), ("darwin", "ppc")):
        assert not asked.marker.evaluate({"sys_platform": system, "platform_machine": machine})
