"""Build kernel wheels with zig, which compiles for all systems and comes from PyPI. Standard library only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

from .platforms import PLATFORMS, Platform, marker

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "wheels"
_TOOLS = FOLDER / "tools"
_PACKAGES = (
    "ziglang==0.17.1",
    "cmake==4.4.4",
    "ninja==1.13.2",
    "scikit-build-core==1.1.2",
    "wheel==0.48.0",
    "setuptools>=77",
    "build",
    "auditwheel==6.8.2",
    "lief==1.0.0",
)
CHECK = Path(__file__).with_name("binaries.py")
# CMake's compiler tests use the same level, because zig builds its C++ library for each level.
_FLAGS = "-O3 -g0"
# A fixed time makes wheels of the same source equal.
_EPOCH = "1577836800"


class BuildError(Exception):
    """A wheel could not be built or is wrong; the message is the tool's."""


def build_all(names: Iterable[str], out: Path) -> list[Path]:
    """Build and check the kernels' wheels of some platforms of `PLATFORMS`, and edgelm's own.

    Cost: some ten minutes on two cores, mostly once: tools (500 MB), zig's C++ libraries and compiled files are kept.
    Raises: BuildError.
    """
    python = tools()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    wheels = [build(PLATFORMS[name], python, out) for name in names]
    print(run([python, CHECK, *wheels]), end="", file=sys.stderr)
    return [*wheels, edgelm(python, out)]


def tools() -> Path:
    """The Python of an environment with the tools, made if it is missing."""
    python = _TOOLS / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = _TOOLS / "installed"
    if not stamp.is_file() or stamp.read_text() != repr(_PACKAGES):
        shutil.rmtree(_TOOLS, ignore_errors=True)
        venv.create(_TOOLS, with_pip=True)
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_PACKAGES])
        stamp.write_text(repr(_PACKAGES))
    return python


def build(platform: Platform, python: Path, out: Path) -> Path:
    """Build one wheel of the kernels. Raises: BuildError."""
    made = FOLDER / "made" / platform.target
    shutil.rmtree(made, ignore_errors=True)
    command = [
        python,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        made,
    ]
    options = (word for key, value in settings(platform).items() for word in ("-C", f"{key}={value}"))
    run([*command, *options, ROOT / "kernels"], zig(python)[1])
    (wheel,) = made.glob("*.whl")
    tags = ["--python-tag", "py3", "--abi-tag", "none", "--platform-tag", platform.tag]
    run([python, "-m", "wheel", "tags", "--remove", *tags, wheel])
    (wheel,) = made.glob("*.whl")
    return Path(shutil.move(wheel, out / wheel.name))


def settings(platform: Platform) -> dict[str, str]:
    """scikit-build-core's settings for a platform."""
    defined = {
        "CMAKE_SYSTEM_NAME": platform.system,
        "CMAKE_SYSTEM_PROCESSOR": platform.processor,
        "CMAKE_CXX_FLAGS": f"-target {platform.target} {_FLAGS}",
        # zig links its C++ library statically; its symbols are stripped.
        "CMAKE_MODULE_LINKER_FLAGS": "-s",
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "CMAKE_CXX_STANDARD_LIBRARIES": "",  # CMake would add a dozen Windows libraries
        "EDGELM_NEON": "-mcpu=generic",
        "EDGELM_NEON_DOT": "-mcpu=generic+dotprod",
        # CMake requires a resource compiler for Windows; nothing is compiled with it.
        "CMAKE_RC_COMPILER": shutil.which("true") or "true",
    }
    return {
        "install.strip": "false",  # this machine's strip handles no other system
        "build-dir": str(FOLDER / "built" / platform.target),
        **{f"cmake.define.{key}": value for key, value in defined.items()},
    }


def zig(python: Path) -> tuple[Path, dict[str, str]]:
    """The compiler, and environment variables that make CMake use it."""
    (program,) = python.parent.parent.glob("lib/python*/site-packages/ziglang/zig")
    places = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    caches = {name: str(FOLDER / "zig") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    return program, {
        **os.environ,
        **caches,
        "CXX": f"{program} c++",
        "PATH": places,
        "SOURCE_DATE_EPOCH": _EPOCH,
    }


def edgelm(python: Path, out: Path) -> Path:
    """Build edgelm's wheel, which requires the kernels of the same source on all platforms that have them.

    The repository's own metadata does not: pip would look for them on its index, even if a compiler is available.
    Raises: BuildError.
    """
    made = FOLDER / "made" / "edgelm"
    shutil.rmtree(made, ignore_errors=True)
    source = made / "source"
    # A copy, because setuptools builds inside the tree and packs leftovers of earlier builds.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    run([python, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, source])
    (wheel,) = made.glob("*.whl")
    run([python, "-m", "wheel", "unpack", "--dest", made, wheel])
    wheel.unlink()
    (metadata,) = made.glob("edgelm-*/*.dist-info/METADATA")
    head, body = metadata.read_text(encoding="utf-8").split("\n\n", 1)
    metadata.write_text(f"{head}\nRequires-Dist: {requirement()}\n\n{body}", encoding="utf-8")
    run([python, "-m", "wheel", "pack", "--dest-dir", out, metadata.parents[1]])
    return out / wheel.name


def requirement() -> str:
    """The requirement of the kernels in edgelm's wheel."""
    project = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return f"{project['name']}=={project['version']}; {marker()}"


def run(command: list[object], environment: dict[str, str] | None = None) -> str:
    """The output of a command. Raises: BuildError with its last lines."""
    words = list(map(str, command))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(words[1:4])} failed: {(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout
