"""The peers' virtual environments: their packages, their setup, and running the harness in them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .processor import cpu_flags, llama_cpp_settings

# By adapter: all versions of a comparison, except edgelm's, which are those of the script's environment.
PACKAGES: dict[str, tuple[str, ...]] = {
    "edgelm": (),
    "genai": (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    ),
    "llama_cpp": (
        "llama-cpp-python==0.3.36",
        "numpy==2.4.6",
        "sentencepiece==0.2.3",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
    # optimum-onnx 0.1.0 needs transformers before 4.58.
    "optimum_onnx": (
        "optimum-onnx==0.1.0",
        "optimum==2.1.0",
        "onnx==1.23.2",
        "onnxruntime==1.31.1",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
    "ctranslate2": ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==4.57.6"),
    "transformers": ("transformers==5.23.0", "torch==2.13.0"),
}
# Built from their source packages for this processor, with these settings. The image part is not needed.
BUILDS: dict[str, dict[str, str]] = {
    "llama-cpp-python==0.3.36": {"CMAKE_ARGS": " ".join([*llama_cpp_settings(cpu_flags()), "-DLLAVA_BUILD=OFF"])}
}
_TIMEOUT_S = 3600
_SCRIPTS = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """A peer cannot be installed, converted or measured. The message is its own last line."""


class Environments:
    """The virtual environments below a folder, made on demand and kept while their packages stay the same.

    versions: of the installed environments' packages, by adapter.
    """

    def __init__(self, cache: Path, threads: int) -> None:
        """threads: for libraries that read their number from the environment."""
        self.versions: dict[str, dict[str, str]] = {}
        self._cache = cache
        self._settings = {
            "HF_HUB_OFFLINE": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": str(threads),
            # edgelm's prepared weights, beside the comparison's other files.
            "EDGELM_HOME": str(cache / "home"),
            "LLAMA_CPP_SOURCE": str(self._source("llama-cpp-python==0.3.36")),
        }

    def install(self, adapter: str) -> None:
        """Make the environment of an adapter. Raises: PeerError."""
        packages = PACKAGES[adapter]
        stamp = self._folder(adapter) / "installed.json"
        wanted = {"packages": list(packages), "builds": [BUILDS[name] for name in packages if name in BUILDS]}
        if packages and not (stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted):
            run([sys.executable, "-m", "venv", "--clear", str(self._folder(adapter))])
            self._pip(adapter, ["install", *(str(self._build(name)) if name in BUILDS else name for name in packages)])
            stamp.write_text(json.dumps(wanted), encoding="utf-8")
        self.versions[adapter] = self._versions(adapter)

    def identity(self, adapter: str) -> dict[str, Any]:
        """The dependencies of a conversion besides the model: if they change, models are converted again."""
        if PACKAGES[adapter]:
            return {"packages": list(PACKAGES[adapter])}
        digest = hashlib.sha256()
        for package in ("edgelm.export", "edgelm.targets"):
            spec = importlib.util.find_spec(package)
            assert spec is not None and spec.submodule_search_locations is not None
            for path in sorted(Path(spec.submodule_search_locations[0]).resolve().rglob("*")):
                if path.suffix in (".py", ".toml"):
                    digest.update(path.read_bytes())
        return {"packages": ["edgelm==" + version("edgelm")], "source": digest.hexdigest()[:16]}

    def harness(self, adapter: str, task: Sequence[str], folder: Path, words: Sequence[str]) -> str:
        """Run the harness in the adapter's environment; returns its JSON. Raises: PeerError."""
        environment = {**os.environ, **self._settings}
        if PACKAGES[adapter]:
            environment.pop("PYTHONPATH", None)
        with tempfile.TemporaryDirectory() as temporary:
            result = Path(temporary) / "result.json"
            command = [self._python(adapter), "-m", "peers.harness", *task, "--folder", str(folder), *words]
            run([*command, "--result", str(result)], environment, cwd=_SCRIPTS)
            return result.read_text(encoding="utf-8")

    def _folder(self, adapter: str) -> Path:
        return self._cache / "env" / adapter

    def _python(self, adapter: str) -> str:
        if not PACKAGES[adapter]:
            return sys.executable
        return str(self._folder(adapter) / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    def _pip(self, adapter: str, words: Sequence[str], settings: Mapping[str, str] | None = None) -> None:
        command = [self._python(adapter), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
        run(command, {**os.environ, **(settings or {})})

    def _versions(self, adapter: str) -> dict[str, str]:
        own = [
            "edgelm",
            "onnxruntime",
            "torch",
            *(["edgelm-kernels"] if importlib.util.find_spec("edgelm_kernels") else []),
        ]
        names = [package.partition("==")[0] for package in PACKAGES[adapter]] or own
        code = "import json, sys; from importlib.metadata import version; "
        code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
        versions: dict[str, str] = json.loads(run([self._python(adapter), "-c", code, *names]))
        return versions

    def _source(self, package: str) -> Path:
        name, _, number = package.partition("==")
        return self._cache / "source" / f"{name.replace('-', '_')}-{number}"

    def _build(self, package: str) -> Path:
        """The wheel of a package, built from its source package unless an earlier run did."""
        source, name = self._source(package), package.partition("==")[0]
        settings = hashlib.sha256(json.dumps(BUILDS[package], sort_keys=True).encode()).hexdigest()[:8]
        wheels = self._cache / "wheels" / settings
        if not source.is_dir():
            self._pip("llama_cpp", ["download", "--no-deps", "--no-binary", name, "-d", str(source.parent), package])
            with tarfile.open(f"{source}.tar.gz") as archive:
                archive.extractall(source.parent, filter="data")
        if not (found := list(wheels.glob(f"{source.name}-*.whl"))):
            self._pip("llama_cpp", ["wheel", "--no-deps", "-w", str(wheels), str(source)], BUILDS[package])
            found = list(wheels.glob(f"{source.name}-*.whl"))
        return found[0]


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """The output of a program. Raises: PeerError with the last line of its errors, or the signal that ended it."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"no end within {_TIMEOUT_S} s") from error
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        raise PeerError(f"ended by {signal.Signals(-done.returncode).name}")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise PeerError(lines[-1][:300] if lines else f"ended with status {done.returncode}")
