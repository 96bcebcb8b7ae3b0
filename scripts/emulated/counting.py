"""Instructions for each token, counted on emulated Arm cores: a stand-in for speed that no other process disturbs.

Debian's QEMU has no plugins, so this builds one from its source, and `counting.c`, the plugin that counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .. import bench
from . import machines

SCHEMES = ("int8-rowwise", "int8-weight", "int4-weight", "int8-tensor", "fp32")
# Of 30 layers and 49,152 tokens: the same proportions, and neither loading nor exporting takes long.
PART = 5
_DECODED, _PROMPT = 4, 32
_FOLDER = machines.FOLDER / "qemu"
_QEMU, _PLUGIN = _FOLDER / "build" / "qemu-aarch64", _FOLDER / "counting.so"
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
_SOURCE, STEPS = (Path(__file__).with_name(name) for name in ("counting.c", "steps.py"))


def report(bundles: dict[str, Path]) -> None:
    """Print instructions for a token of decoding and of a prompt, in millions, for each core and scheme."""
    build()
    for core in (core.cpu for core in machines.CORES.values() if core.architecture == "aarch64"):
        for scheme, bundle in bundles.items():
            decode, prompt = per_token(core, bundle)
            print(f"  {core:12} {scheme:14} decode {decode / 1e6:9.2f} M, prompt {prompt / 1e6:9.2f} M", flush=True)


def model() -> Path:
    """The folder of a fifth of the reference model, with random weights: what is computed does not depend on them."""
    folder = machines.FOLDER / "reference-fifth"
    if not (folder / "tokenizer.json").is_file():
        config = json.loads(bench.REFERENCE.read_text(encoding="utf-8"))
        config |= {name: config[name] // PART for name in ("num_hidden_layers", "vocab_size")}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        bench.build_model(folder, folder / "config.json", "float32")
    return folder


def per_token(core: str, bundle: Path) -> tuple[float, float]:
    """Instructions for one token that is decoded, and for one of a prompt. Raises: NotHereError."""
    arguments = (str(STEPS), str(bundle), str(_DECODED), str(_PROMPT))
    command = machines.command(core, *arguments, qemu=_QEMU, options=("-plugin", str(_PLUGIN)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise machines.NotHereError(f"{core}: nothing was counted: {done.stderr.strip()[-500:]}")
    return split(done.stderr)


def split(told: str) -> tuple[float, float]:
    """The same from what the plugin told at the three marks."""
    begin, middle, end = map(int, re.findall(r"^executed: (\d+)$", told, re.MULTILINE))
    return (middle - begin) / _DECODED, (end - middle) / _PROMPT


def build() -> None:
    """Build QEMU and the plugin, unless that was done: about five minutes on two cores. Raises: NotHereError."""
    if not _QEMU.is_file():
        _build_qemu()
    headers = _FOLDER / "headers" / "usr"
    places = [_FOLDER / "source" / "include" / "qemu", headers / "include" / "glib-2.0"]
    places.append(headers / "lib" / "x86_64-linux-gnu" / "glib-2.0" / "include")
    includes = [f"-I{place}" for place in places]
    machines.run(["cc", "-O2", "-shared", "-fPIC", *includes, "-o", str(_PLUGIN), str(_SOURCE)])


def _build_qemu() -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)  # what an interrupted run left
    _FOLDER.mkdir()
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
    machines.run([str(tools / "ninja"), _QEMU.name], _FOLDER / "build", environment)
