"""Pack onnxruntime-gpu for one kind of GPU into parts that can be transferred one at a time.

    python scripts/gpu/pack.py FOLDER [--python 3.12] [--architecture 90] [--part-mib 58] [--add PATH...]

Downloads the wheel, removes what bundles for cuda do not need (the TensorRT provider, tools, kernels for other GPUs and
for mixtures of experts), adds folders of bundles, and writes FOLDER/parts/site.tar.xz.00 and so on, with digests in
FOLDER/parts/digests. Needs the package zstandard.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from fatbin import strip_kernels

_WHEEL = "onnxruntime-gpu==1.31.1"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_LEFT_OUT = re.compile(r"/(tools/|transformers/models/|datasets/|backend/|ThirdParty)|providers_tensorrt")
_KERNELS = "providers_cuda.so"
# Mixtures of experts are half of all kernels; bundles have no attention in bfloat16.
_UNWANTED = re.compile(rb"GroupProblemShape|[Mm]oe|MOE|deep_gemm|flash_fwd[^\n]*bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, 90 for 9.0 (%(default)s)")
    parser.add_argument("--part-mib", type=int, default=58)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="folders to add as bundles/NAME")
    arguments = parser.parse_args()
    wheel = download(arguments.folder, arguments.python)
    stream = io.BytesIO()
    with lzma.open(stream, "w", preset=3) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        add_wheel(archive, wheel, arguments.architecture)
        for folder in arguments.add:
            archive.add(folder, f"bundles/{folder.name}")
    write_parts(stream.getbuffer(), arguments.folder / "parts", arguments.part_mib << 20)


def download(folder: Path, python: str) -> Path:
    """Download the wheel unless it is there."""
    found = sorted(folder.glob("onnxruntime_gpu-*.whl"))
    if not found:
        platforms = [f"--platform={name}" for name in _PLATFORMS]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
        subprocess.run([*command, f"--python-version={python}", f"--dest={folder}", _WHEEL], check=True)
        found = sorted(folder.glob("onnxruntime_gpu-*.whl"))
    return found[-1]


def add_wheel(archive: tarfile.TarFile, wheel: Path, architecture: int) -> None:
    """Add the needed files of a wheel, under site/."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.endswith("/") or _LEFT_OUT.search(name):
                continue
            data = bytearray(files.read(name))
            if name.endswith(_KERNELS):
                kept, gone = strip_kernels(data, architecture, _UNWANTED)
                print(f"{name}: kernels of {kept:,} bytes stay, of {gone:,} go")
            entry = tarfile.TarInfo(f"site/{name}")
            entry.size, entry.mode = len(data), 0o755 if ".so" in name else 0o644
            archive.addfile(entry, io.BytesIO(data))


def write_parts(data: memoryview, folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    lines = []
    for number, begin in enumerate(range(0, len(data), size)):
        part = folder / f"site.tar.xz.{number:02}"
        part.write_bytes(data[begin : begin + size])
        lines.append(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n")
        print(part, part.stat().st_size)
    (folder / "digests").write_text("".join(lines))


if __name__ == "__main__":
    main()
