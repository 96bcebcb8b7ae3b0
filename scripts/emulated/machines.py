"""Emulated machines: processors of QEMU's user mode, with a Python and the runtime's packages.

Needs a 64-bit x86 machine with Debian. `prepare` fills one folder, as any user, and installs nothing. QEMU and the
arm64 Python come from the machine's configured apt sources, the packages from its pip index.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulated"
_QEMU = "qemu-user"
# Libraries that the arm64 interpreter and onnxruntime need; maintainer scripts are not run.
_LIBRARIES = [
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libexpat1",
    "libffi8",
    "libsqlite3-0",
    "libuuid1",
]
_PYTHON = ("python{0}-minimal", "libpython{0}-minimal", "libpython{0}-stdlib")
_WHEELS = [
    "numpy",
    "onnxruntime",
    "tokenizers",
    "psutil",
    "jinja2",
    "markupsafe",
    "pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
]
_WHEELS += ["hypothesis", "sortedcontainers"]
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NotHereError(Exception):
    """The machines cannot be prepared on this computer; the message says why."""


@dataclass(frozen=True)
class Core:
    """A processor: QEMU's name, its architecture, and what it represents."""

    cpu: str
    architecture: str
    stands_for: str


CORES = {
    core.cpu: core
    for core in (
        Core("cortex-a72", "aarch64", "Raspberry Pi 4: no dot product instructions"),
        Core("cortex-a76", "aarch64", "Raspberry Pi 5: dot product"),
        Core("neoverse-v1", "aarch64", "a current core: dot product, i8mm, bf16, SVE"),
        Core("Haswell-noTSX", "x86_64", "x86 with AVX2 and without VNNI"),
    )
}


def is_ready() -> bool:
    """Whether `prepare` was run for these packages."""
    stamp = FOLDER / "ready"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _fingerprint()


def command(
    cpu: str,
    *arguments: str,
    qemu: Path | None = None,
    options: tuple[str, ...] = (),
    packages: tuple[Path, ...] = (),
) -> list[str]:
    """The command that runs Python with these arguments on a processor of `CORES`.

    qemu: another build of QEMU than Debian's; options: of QEMU; packages: folders with more packages for Arm.
    """
    architecture = CORES[cpu].architecture
    start = [str(qemu or FOLDER / "host" / "usr" / "bin" / f"qemu-{architecture}"), "-cpu", cpu, *options]
    if architecture == "x86_64":
        return [*start, sys.executable, *arguments]
    root = FOLDER / "arm64"
    paths = ":".join(map(str, (*packages, FOLDER / "packages", FOLDER / "tree")))
    settings = {"PYTHONHOME": root / "usr", "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": 1}
    # Under emulation, the threads of numpy's OpenBLAS keep spinning, where elsewhere they soon sleep.
    settings |= {"OPENBLAS_NUM_THREADS": 1}
    start += ["-L", str(root), *(word for key, value in settings.items() for word in ("-E", f"{key}={value}"))]
    (python,) = (root / "usr" / "bin").glob("python3.*")
    return [*start, str(python), *arguments]


def kernels() -> Path:
    """A folder with the package edgelm-kernels for Arm, compiled here. Raises: NotHereError, without a cross
    compiler."""
    folder, compiler = FOLDER / "kernels", "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        raise NotHereError(f"no compiler for Arm here: Debian has it as g++-aarch64-linux-gnu ({compiler})")
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    run(["cmake", "-S", str(ROOT / "kernels"), "-B", str(folder / "build"), *system])
    run(["cmake", "--build", str(folder / "build")])
    run(["cmake", "--install", str(folder / "build"), "--prefix", str(folder)])
    shutil.copy(ROOT / "kernels" / "edgelm_kernels" / "__init__.py", folder / "edgelm_kernels")
    return folder


def prepare() -> None:
    """Fetch and unpack everything unless done before: about 15 seconds and 600 MB. Raises: NotHereError."""
    if is_ready():
        return
    if platform.machine() != "x86_64" or shutil.which("apt-get") is None:
        raise NotHereError("the emulated machines need Debian on x86-64")
    for part in ("apt", "host", "arm64", "packages", "tree"):
        shutil.rmtree(FOLDER / part, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    apt = Apt(FOLDER / "apt")
    apt.unpack([_QEMU], FOLDER / "host")
    version = apt.version("python3:arm64")
    names = [*_LIBRARIES, *(name.format(version) for name in _PYTHON)]
    apt.unpack([f"{name}:arm64" for name in names], FOLDER / "arm64")
    _install_wheels(version)
    tree = FOLDER / "tree" / "edgelm"
    tree.mkdir(parents=True)
    for package in ("export", "runtime", "targets"):
        (tree / package).symlink_to(ROOT / package)
    (FOLDER / "ready").write_text(_fingerprint(), encoding="utf-8")


def _fingerprint() -> str:
    names = repr((_QEMU, _LIBRARIES, _PYTHON, _WHEELS, _PLATFORMS, _codename()))
    return hashlib.sha256(names.encode() + (ROOT / "constraints.txt").read_bytes()).hexdigest()


def _install_wheels(version: str) -> None:
    options = [item for name in _PLATFORMS for item in ("--platform", name)]
    options += ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, "--no-deps"]
    constraints = ["-c", str(ROOT / "constraints.txt"), "--target", str(FOLDER / "packages")]
    run([sys.executable, "-m", "pip", "install", "--quiet", *options, *constraints, *_WHEELS])


class Apt:
    """Debian's packages, with lists and downloads in a folder of its own. The machine's apt is only read."""

    def __init__(self, folder: Path) -> None:
        """Raises: NotHereError, if the machine's sources are not Debian's."""
        self._downloads = folder / "downloads"
        for part in ("state/lists/partial", "cache/archives/partial", "parts", "downloads"):
            (folder / part).mkdir(parents=True)
        sources, preferences = folder / "sources.list", folder / "preferences"
        sources.write_text("\n".join(_sources()) + "\n", encoding="utf-8")
        # The release's own QEMU may be too old: bookworm's crashes when onnxruntime is imported.
        pin = f"Package: {_QEMU}\nPin: release n={_codename()}-backports\nPin-Priority: 990\n"
        preferences.write_text(pin, encoding="utf-8")
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": folder / "parts",
            "Dir::Etc::preferences": preferences,
            "Dir::Etc::preferencesparts": folder / "parts",
            "APT::Sandbox::User": "",
        }
        file = folder / "apt.conf"
        file.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()), encoding="utf-8")
        self._environment = {**os.environ, "APT_CONFIG": str(file)}
        run(["apt-get", "update", "-q"], environment=self._environment)

    def version(self, package: str) -> str:
        """The first two numbers of a package's version."""
        shown = run(["apt-cache", "show", "--no-all-versions", package], environment=self._environment)
        version = next(line.split()[1] for line in shown.splitlines() if line.startswith("Version:"))
        return ".".join(version.split(".")[:2])

    def unpack(self, packages: list[str], target: Path) -> None:
        """Download packages and unpack them below a folder. Raises: NotHereError."""
        for old in self._downloads.iterdir():
            old.unlink()
        run(["apt-get", "download", "-q", *packages], self._downloads, self._environment)
        (target / "usr" / "lib").mkdir(parents=True)
        (target / "lib").symlink_to("usr/lib")
        for file in self._downloads.glob("*.deb"):
            run(["dpkg", "-x", str(file), str(target)])

    def source(self, package: str) -> Path:
        """Download a package's upstream source; returns its archive. Raises: NotHereError."""
        # Debian's own changes are not needed.
        run(["apt-get", "source", "-q", "--download-only", "--tar-only", package], self._downloads, self._environment)
        return next(self._downloads.glob("*.orig.tar.*"))


def run(arguments: list[str], folder: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """The output of a command. Raises: NotHereError with its last lines, if it fails."""
    program = shutil.which(arguments[0])
    if program is None:
        raise NotHereError(f"there is no {arguments[0]} here")
    command_line = [program, *arguments[1:]]
    done = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"{' '.join(arguments[:3])} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def _codename() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def _sources() -> list[str]:
    """Lines for apt: the release's main archive as in the machine's apt, and its backports for QEMU."""
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY)"
    listed = run(["apt-get", "indextargets", "--no-release-info", "--format", fields]).splitlines()
    release = _codename()
    places = {line.split()[0] for line in listed if line.split()[1:] == [release, "main", "Packages"]}
    if not places or not _KEYRING.is_file():
        raise NotHereError(f"apt is configured with no Debian archive of {release or 'this system'}")
    place = sorted(places)[0]
    signed = f"signed-by={_KEYRING}"
    return [
        f"deb [arch=amd64,arm64 {signed}] {place} {release} main",
        f"deb [arch=amd64 {signed}] {place} {release}-backports main",
        f"deb-src [{signed}] {place} {release}-backports main",
    ]
