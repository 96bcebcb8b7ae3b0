"""Read from the binary what a wheel's library imports, exports and was compiled for, and find faults.

    python binaries.py WHEEL [WHEEL ...]

Runs with the tools of `build.py`: lief reads the binaries of all systems, auditwheel those of Linux. Exit status 1 if
something is wrong.
"""

from __future__ import annotations

import fnmatch
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import lief
from platforms import PLATFORMS, Platform

EXPORTS = frozenset({"RegisterCustomOps", "edgelm_kernels_arithmetic"})
# Symbols that zig's linker leaves visible on macOS: C++'s weak operators new and delete, as in any C++ library there,
# which the system merges with its own (all are malloc and free), and two marks of the format.
_OF_MACOS = ("_Zn*", "_Zd*", "__dso_handle", "_mh_dylib_header")
_ELF = {lief.ELF.ARCH.X86_64: "x86_64", lief.ELF.ARCH.AARCH64: "aarch64"}
_PE = {lief.PE.Header.MACHINE_TYPES.AMD64: "x86_64"}
_MACHO = {lief.MachO.Header.CPU_TYPE.ARM64: "arm64", lief.MachO.Header.CPU_TYPE.X86_64: "x86_64"}


@dataclass(frozen=True)
class Library:
    """machine: format and architecture; imports: libraries; page_bytes: the largest page that its segments fit; signed:
    whether it has the signature that an Arm Mac requires."""

    machine: str
    imports: frozenset[str]
    exports: frozenset[str]
    page_bytes: int
    signed: bool = True


def read(file: Path) -> Library:
    """Read a library of any system. Raises: ValueError, if it is none."""
    binary = lief.parse(str(file))
    if isinstance(binary, lief.ELF.Binary):
        return _read_elf(binary)
    if isinstance(binary, lief.PE.Binary):
        return _read_pe(binary)
    if isinstance(binary, lief.MachO.Binary):
        return _read_macho(binary)
    raise ValueError(f"{file} is no library")


def _read_elf(binary: lief.ELF.Binary) -> Library:
    loaded = [segment.alignment for segment in binary.segments if segment.type == lief.ELF.Segment.TYPE.LOAD]
    return Library(
        f"elf {_ELF.get(binary.header.machine_type)}",
        frozenset(map(str, binary.libraries)),
        frozenset(symbol.name for symbol in binary.exported_symbols),
        min(loaded),
    )


def _read_pe(binary: lief.PE.Binary) -> Library:
    table = binary.get_export()
    return Library(
        f"pe {_PE.get(binary.header.machine)}",
        frozenset(entry.name for entry in binary.imports),
        frozenset(entry.name for entry in table.entries),
        binary.optional_header.section_alignment,
    )


def _read_macho(binary: lief.MachO.Binary) -> Library:
    own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    begins = [segment.virtual_address for segment in binary.segments if segment.virtual_size]
    page = min(begin & -begin for begin in begins if begin)
    return Library(
        f"macho {_MACHO.get(binary.header.cpu_type)}",
        frozenset(library.name for library in binary.libraries if library.command != own),
        frozenset(symbol.name.removeprefix("_") for symbol in binary.exported_symbols),
        page,
        binary.has_code_signature or binary.has_code_signature_dir,
    )


def faults(library: Library, platform: Platform) -> list[str]:
    """The faults of a library for a platform, a sentence each."""
    found = []
    if library.machine != platform.machine:
        found.append(f"it is compiled for {library.machine}, not for {platform.machine}")
    strange = {name for name in library.imports if not any(fnmatch.fnmatch(name, known) for known in platform.imports)}
    if strange:
        found.append(f"it needs {', '.join(sorted(strange))}")
    beside = _OF_MACOS if platform.system == "Darwin" else ()
    exported = {name for name in library.exports if not any(fnmatch.fnmatch(name, known) for known in beside)}
    if exported != EXPORTS:
        found.append(f"it exports {', '.join(sorted(exported ^ EXPORTS))} in addition, or does not")
    if library.page_bytes < platform.page_bytes:
        found.append(f"its segments are made for pages of {library.page_bytes} bytes, not {platform.page_bytes}")
    if platform.machine == "macho arm64" and not library.signed:
        found.append("it is not signed")
    return found


def check(wheel: Path) -> list[str]:
    """The faults of a wheel."""
    platform = next((item for item in PLATFORMS.values() if wheel.name.endswith(f"-py3-none-{item.tag}.whl")), None)
    if platform is None:
        return ["it is for no platform that is known"]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        file = Path(folder) / "edgelm_kernels" / platform.library
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found = faults(read(file), platform)
        if file.with_suffix(".sha256").read_text() != digest:
            found.append("the digest beside the library is another one's")
    return found + (_audit(wheel, platform) if platform.system == "Linux" else [])


def _audit(wheel: Path, platform: Platform) -> list[str]:
    """auditwheel's findings for a Linux wheel."""
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = " ".join((done.stdout + done.stderr).split())
    tag = platform.tag.split(".")[-1]
    consistent = f'is consistent with the following platform tag: "{tag}"'
    return [] if consistent in told else [f"auditwheel: {told}"]


def main(wheels: list[str]) -> int:
    """Check wheels and print the findings. Returns the process's exit status."""
    wrong = {wheel: found for wheel in wheels if (found := check(Path(wheel)))}
    for wheel in wheels:
        print(f"{Path(wheel).name}: {'; '.join(wrong.get(wheel, ['checked']))}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
