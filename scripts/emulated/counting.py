"""Instructions per token, counted on emulated Arm cores. Unlike a speed, the count does not depend on other processes.

Debian's QEMU has no plugins, so this builds one from its source, and `counting.c`, the plugin that counts.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .. import reference_model
from . import machines

# Each scheme with arm-cpu's cache for it, and the default scheme also with the other cache.
SCHEMES = ("int8-rowwise", "int8-weight", "int4-weight", "int8-tensor", "fp32")
SERVED = "int8-rowwise"  # by compiled kernels
OTHER = (SERVED, "float32")
# This part of the reference model is counted, in the same proportions, because loading and exporting take long. On a
# Cortex-A72, five times its counts are within 1 % of the whole model's.
PART = 5
_DECODED, _SHORT, _LONG = 4, 32, 256
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
    """Print the instructions of tokens, in millions, for each core and bundle, scaled to the whole reference model; for
    bundles with compiled kernels, without and with them. Raises: NotHereError."""
    build()
    kernels = machines.kernels()
    for core in (core.cpu for core in machines.CORES.values() if core.architecture == "aarch64"):
        for name, bundle in bundles.items():
            _show(core, name, per_token(core, bundle))
            if SERVED in name:
                _show(core, f"{name}, kernels", per_token(core, bundle, kernels))


def _show(core: str, name: str, instructions: dict[str, float]) -> None:
    figures = ", ".join(f"{kind} {PART * number / 1e6:8.2f} M" for kind, number in instructions.items())
    print(f"  {core:12} {name:38} {figures}", flush=True)


def model() -> Path:
    """The folder of a part of the reference model, with fewer layers, a smaller vocabulary and random weights."""
    folder = machines.FOLDER / "reference-part"
    if not (folder / "tokenizer.json").is_file():
        config = json.loads(reference_model.REFERENCE.read_text(encoding="utf-8"))
        config |= {name: config[name] // PART for name in ("num_hidden_layers", "vocab_size")}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        reference_model.build_model(folder, folder / "config.json", "float32")
    return folder


def per_token(core: str, bundle: Path, *packages: Path) -> dict[str, float]:
    """Instructions for one token decoded after a short prompt, the increase for each further token before it, and for
    one token of a long prompt. packages: as in `machines.command`.

    Raises: NotHereError.
    """
    arguments = (str(STEPS), str(bundle), *map(str, (_DECODED, _SHORT, _LONG)))
    command = machines.command(core, *arguments, qemu=_QEMU, options=("-plugin", str(_PLUGIN)), packages=packages)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise machines.NotHereError(f"{core}: nothing was counted: {done.stderr.strip()[-500:]}")
    return split(done.stderr)


def split(told: str) -> dict[str, float]:
    """The same from the plugin's output at the marks."""
    marks = list(map(int, re.findall(r"^executed: (\d+)$", told, re.MULTILINE)))
    near, prompt, far = (end - begin for begin, end in itertools.pairwise(marks))
    # One token is decoded, uncounted, before the first mark.
    context = (far - near) / _DECODED / (_LONG - _SHORT - 1)
    return {"decode": near / _DECODED, "context": context, "prompt": prompt / _LONG}


def build() -> None:
    """Build QEMU and the plugin unless done before: about five minutes on two cores. Raises: NotHereError."""
    if not _QEMU.is_file():
        _build_qemu()
    headers = _FOLDER / "headers" / "usr"
    places = [_FOLDER / "source" / "include" / "qemu", headers / "include" / "glib-2.0"]
    places.append(headers / "lib" / "x86_64-linux-gnu" / "glib-2.0" / "include")
    includes = [f"-I{place}" for place in places]
    machines.run(["cc", "-O2", "-shared", "-fPIC", *includes, "-o", str(_PLUGIN), str(_SOURCE)])


def _build_qemu() -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)  # may remain from an interrupted run
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
