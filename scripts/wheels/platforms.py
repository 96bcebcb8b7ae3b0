"""The platforms that wheels of the kernels are built for. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """target: zig's name; tag: of its wheels; system, processor: CMake's names; python: `sys.platform` and
    `platform.machine()` there; machine: the binary's architecture as named in `binaries.py`; imports: the only
    libraries that the binary may need, as patterns; page_bytes: the largest memory page of such a machine."""

    target: str
    tag: str
    system: str
    processor: str
    python: tuple[str, str]
    machine: str
    imports: tuple[str, ...]
    page_bytes: int

    @property
    def library(self) -> str:
        """The file's name inside the package."""
        return "kernels" + {"Windows": ".dll", "Darwin": ".dylib"}.get(self.system, ".so")


# No libstdc++, libgcc_s or libc++: those are linked statically.
_GLIBC = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-*.so.*")
# All are part of Windows 10; no runtime has to be installed.
_WINDOWS = ("KERNEL32.dll", "ntdll.dll", "api-ms-win-crt-*.dll", "api-ms-win-core-synch-*.dll")
_MACOS = ("/usr/lib/libSystem.B.dylib",)
_X86_PAGE, _APPLE_PAGE, _ARM_PAGE = 1 << 12, 1 << 14, 1 << 16

PLATFORMS = {
    "linux-x86_64": Platform(
        "x86_64-linux-gnu.2.17",
        "manylinux2014_x86_64.manylinux_2_17_x86_64",
        "Linux",
        "x86_64",
        ("linux", "x86_64"),
        "elf x86_64",
        _GLIBC,
        _X86_PAGE,
    ),
    "linux-aarch64": Platform(
        "aarch64-linux-gnu.2.17",
        "manylinux2014_aarch64.manylinux_2_17_aarch64",
        "Linux",
        "aarch64",
        ("linux", "aarch64"),
        "elf aarch64",
        _GLIBC,
        _ARM_PAGE,
    ),
    "windows-x86_64": Platform(
        "x86_64-windows-gnu",
        "win_amd64",
        "Windows",
        "AMD64",
        ("win32", "AMD64"),
        "pe x86_64",
        _WINDOWS,
        _X86_PAGE,
    ),
    "macos-arm64": Platform(
        "aarch64-macos.11.0",
        "macosx_11_0_arm64",
        "Darwin",
        "arm64",
        ("darwin", "arm64"),
        "macho arm64",
        _MACOS,
        _APPLE_PAGE,
    ),
    "macos-x86_64": Platform(
        "x86_64-macos.11.0",
        "macosx_11_0_x86_64",
        "Darwin",
        "x86_64",
        ("darwin", "x86_64"),
        "macho x86_64",
        _MACOS,
        _X86_PAGE,
    ),
}


def marker() -> str:
    """The environment marker of all platforms that have wheels."""
    found: dict[str, list[str]] = {}
    for platform in PLATFORMS.values():
        machines = found.setdefault(platform.python[0], [])
        if platform.python[1] not in machines:
            machines.append(platform.python[1])
    one = "(sys_platform == '{}' and ({}))"
    return " or ".join(
        one.format(system, " or ".join(f"platform_machine == '{machine}'" for machine in machines))
        for system, machines in found.items()
    )
