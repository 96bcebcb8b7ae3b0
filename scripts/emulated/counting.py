"""Instructions for each token, counted on emulated Arm cores: a stand-in for speed that no other process disturbs.

Debian's QEMU has no plugins, so this builds one from its source, with the plugin that counts instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from . import machines

_FOLDER = machines.FOLDER / "qemu"
_TARGETS = ("qemu-aarch64", "tests/tcg/plugins/libinsn.so")
_HEADERS = [
    "libglib2.0-dev",
    "libglib2.0-dev-bin",
    "libglib2.0-0",
    "libpcre2-dev",
    "libpcre2-8-0",
    "zlib1g-dev",
    "zlib1g",
]
_CONFIGURE = ["--target-list=aarch64-linux-user", "--without-default-features", "--enable-plugins", "--disable-system"]
_CONFIGURE += ["--disable-tools", "--disable-docs", "--disable-guest-agent", "--disable-install-blobs"]
_STEPS = Path(__file__).with_name("steps.py")
_PRODUCTS = Path(__file__).with_name("products.py")
_CORES = ("cortex-a72", "cortex-a76", "neoverse-v1")


def report_products() -> None:
    """Print instructions for one product of a row with a matrix of 576 x 1,536, in thousands, for each way and core."""
    build()
    from . import kernels

    for core in _CORES:
        for name, graph in kernels.write(_FOLDER / "products").items():
            once, often = (count(core, str(_PRODUCTS), str(graph), times) for times in ("1", "101"))
            print(f"  {core:12} {name:14} {(often - once) / 100 / 1e3:9.0f} thousand a product", flush=True)


def report(bundles: dict[str, Path]) -> None:
    """Print instructions for a token of decoding and of a prompt, in millions, for each scheme and core."""
    build()
    for core in _CORES:
        for scheme, bundle in bundles.items():
            decode, prompt = per_token(core, bundle)
            print(f"  {core:12} {scheme:14} decode {decode / 1e6:9.2f} M, prompt {prompt / 1e6:9.2f} M", flush=True)


def per_token(core: str, bundle: Path) -> tuple[float, float]:
    """Instructions for one token that is decoded, and for one of a prompt of 64 tokens."""
    runs = (("4", "0"), ("12", "0"), ("4", "2"))
    started, decoded, prompted = (count(core, str(_STEPS), str(bundle), *steps) for steps in runs)
    return (decoded - started) / 8, (prompted - started) / (2 * 64)


def count(core: str, *arguments: str) -> int:
    """Instructions of a whole process of Python with these arguments."""
    plugin = _FOLDER / "build" / _TARGETS[1]
    options = ("-plugin", str(plugin), "-d", "plugin")
    command = machines.command(core, *arguments, qemu=_FOLDER / "build" / _TARGETS[0], options=options)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"total insns: (\d+)", done.stderr + done.stdout)
    if done.returncode or found is None:
        raise machines.NotHereError(f"{core}: nothing was counted: {done.stderr.strip()[-500:]}")
    return int(found.group(1))


def build() -> None:
    """Build QEMU with plugins, unless that was done: about five minutes on two cores. Raises: NotHereError."""
    if all((_FOLDER / "build" / name).is_file() for name in _TARGETS):
        return
    _FOLDER.mkdir(exist_ok=True)
    apt = machines.Apt(_FOLDER / "apt")
    headers = _FOLDER / "headers"
    apt.unpack(_HEADERS, headers)
    libraries = headers / "usr" / "lib" / "x86_64-linux-gnu"
    for file in (libraries / "pkgconfig").glob("*.pc"):
        file.write_text(file.read_text().replace("prefix=/usr", f"prefix={headers / 'usr'}", 1))
    (_FOLDER / "source").mkdir()
    archive = apt.source("qemu")
    machines.run(["tar", "xf", str(archive), "--strip-components=1", "-C", str(_FOLDER / "source")])
    tools = _FOLDER / "tools" / "bin"
    machines.run([sys.executable, "-m", "venv", str(tools.parent)])
    machines.run(
        [str(tools / "python"), "-m", "pip", "install", "-q", *["meson", "ninja", "distlib", "pycotap==1.3.1"]]
    )
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PKG_CONFIG_PATH": f"{libraries}/pkgconfig"}
    (_FOLDER / "build").mkdir()
    flags = [f"--python={tools / 'python'}", f"--extra-ldflags=-L{libraries} -Wl,-rpath,{libraries}"]
    machines.run([str(_FOLDER / "source" / "configure"), *_CONFIGURE, *flags], _FOLDER / "build", environment)
    machines.run([str(tools / "ninja"), *_TARGETS], _FOLDER / "build", environment)
