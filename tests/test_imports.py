"""Imports: their direction between packages, heavy imports only late, and locked public names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

# plugins -> export, runtime; export -> runtime, targets; runtime -> nothing of ours; targets -> nothing.
ALLOWED = {
    "plugins": {"export", "runtime"},
    "export": {"export", "runtime", "targets"},
    "runtime": {"runtime"},
    "targets": {"targets"},
}
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "rich",
    "accelerate",
    "peft",
)

PUBLIC = {
    "edgelm.runtime": [
        "Bundle", "Chunk", "Completion", "EdgelmError", "Engine", "GenerationSettings", "Manifest", "MemoryEstimate",
        "PrefixCacheSettings", "ResponseCacheSettings", "Stats", "Stream", "TokenLogprob", "estimate_memory", "load",
    ],
    "edgelm.export": ["ExportConfig", "ExportResult", "compress_model", "export_model"],
    "edgelm.targets": [
        "Gate",
        "Limits",
        "Profile",
        "Setting",
        "TargetError",
        "available_targets",
        "load_target",
        "native_target",
        "settings_of",
    ],
}  # fmt: skip


def _imports(path: Path) -> list[str]:
    """Every imported module of a file; relative imports are written out as edgelm.PACKAGE..."""
    package = ["edgelm", *path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return found


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_one_way(package: str) -> None:
    for path in _sources(package):
        for name in _imports(path):
            if name.startswith("edgelm."):
                assert name.split(".")[1] in ALLOWED[package], f"{path} imports {name}"


# Layers, lowest first. A module imports from its own folder and from lower layers, also in functions.
EXPORT_LAYERS = (
    {"codes", "errors", "libraries", "texts"},
    {"config", "module", "passes", "stages"},
    {"quantization", "source"},
    {"gate", "tracing"},
    {"output", "records"},
    {"compress", "weight_choice"},
    {"fp32_graph", "quantized_graph"},
    {"pipeline"},
    {"sizes"},
    {"commands"},
)
RUNTIME_LAYERS = (
    {"errors"},
    {"setting_values"},
    {"settings", "results"},
    {"host"},
    {"bundle"},
    {"sessions"},
    {"decoding", "text"},
    {"caches"},
    {"evaluation", "serving"},
    {"engine", "estimate", "fake"},
    {"opening"},
    {"server"},
    {"cli"},
    {"commands"},
    {"program"},
    {"frozen"},
)


def _own_imports(path: Path) -> list[str]:
    """Our modules that a file imports, as paths from the root without the suffix."""
    folder = list(path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = "/".join([*base, alias.name])
                found.append(inner if (ROOT / f"{inner}.py").is_file() else "/".join(base))
    return found


@pytest.mark.parametrize(("package", "layers"), [("runtime", RUNTIME_LAYERS), ("export", EXPORT_LAYERS)])
def test_each_layer_imports_only_lower_layers(package: str, layers: tuple[set[str], ...]) -> None:
    rank = {name: index for index, names in enumerate(layers) for name in names}
    assert len(rank) == sum(map(len, layers)), "a name stands in two layers"
    folders = {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in _sources(package)}
    assert folders - {"__init__"} == rank.keys()
    for path in _sources(package):
        layer = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in _own_imports(path):
            top, _, other = name.partition("/")
            other = other.partition("/")[0]
            if top == package and layer not in ("__init__", other):
                assert rank[other] < rank[layer], f"{path} imports {name}"


@pytest.mark.parametrize("package", ["runtime", "export"])
def test_no_import_cycles(package: str) -> None:
    imports = {path.relative_to(ROOT).with_suffix("").as_posix(): set(_own_imports(path)) for path in _sources(package)}
    done: set[str] = set()

    def follow(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in imports.get(name, set()) - {name}:
                follow(other, (*above, name))
            done.add(name)

    for name in imports:
        follow(name, ())


def _names(path: Path) -> set[str]:
    """What a module defines or imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found


def test_scripts_import_from_each_other_what_exists() -> None:
    """Scripts run outside of the tests, some once a year."""
    checked = 0
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            base = path.parents[node.level - 1] if node.level else ROOT / "scripts"
            other = base.joinpath(*node.module.removeprefix("scripts.").split(".")).with_suffix(".py")
            if other.is_file():
                missing = {alias.name for alias in node.names} - _names(other)
                assert not missing, f"{path} imports {missing} from {other}"
                checked += 1
    assert checked > 30


def test_no_folder_is_crowded() -> None:
    """Folders with one kind of file, passes or commands, may have more."""
    for package in ("runtime", "export", "targets"):
        for folder in {path.parent for path in _sources(package)}:
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= 14 or folder.name in ("passes", "commands"), folder


@pytest.mark.parametrize("package", ["plugins", "runtime", "targets"])
def test_no_heavy_import_in_the_packages_of_the_device(package: str) -> None:
    for path in _sources(package):
        assert not {name.split(".")[0] for name in _imports(path)} & set(HEAVY), path


def test_targets_need_the_standard_library_only() -> None:
    for path in _sources("targets"):
        for name in _imports(path):
            root = name.split(".")[0]
            assert root in sys.stdlib_module_names or root == "edgelm", f"{path} imports {name}"


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Blocker())
"""


def test_the_runtime_works_without_the_heavy_packages(tiny_bundle: Path) -> None:
    code = BLOCKER.format(names=set(HEAVY)) + (
        "import edgelm.runtime\n"
        f"with edgelm.runtime.load({str(tiny_bundle)!r}) as engine:\n"
        "    assert engine.generate('Once', max_tokens=4).stats.generated_tokens > 0\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize(
    "package", ["edgelm.runtime", "edgelm.export", "edgelm.runtime.cli", "edgelm.export.commands.export"]
)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    late = [
        *HEAVY,
        "onnxruntime",
        "llguidance",
        "asyncio",
        "tokenizers",
        "jinja2",
        *(["numpy"] if package != "edgelm.runtime.cli" else []),
    ]
    code = f"import sys, {package}; print([name for name in {late!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answering_a_prompt_reads_no_packages_metadata() -> None:
    """`importlib.metadata` imports email, archive and CSV modules: 4 MB."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import edgelm.runtime.cli, edgelm.runtime.commands.run, edgelm.runtime.sessions.numerics\n"
        "assert edgelm.runtime.sessions.numerics.of_machine()\n"
        "print('importlib.metadata' in sys.modules.keys() - before)"
    )
    environment = {**os.environ, "EDGELM_KERNELS": "on"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names_are_locked(module: str) -> None:
    package = __import__(module, fromlist=["__all__"])
    assert sorted(package.__all__) == sorted(PUBLIC[module])
    for name in PUBLIC[module]:
        assert getattr(package, name).__doc__, f"{module}.{name} has no docstring"
    with pytest.raises(AttributeError):
        _ = package.no_such_name


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    code = (
        "import os, sys, builtins\n"
        "real = builtins.__import__\n"
        "from edgelm.runtime.host.ort import load_onnxruntime\n"
        "import importlib; plain = importlib.import_module\n"
        "def watch(name, *rest):\n"
        "    if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY'), 'onnxruntime' in sys.modules)\n"
        "    return plain(name, *rest)\n"
        "importlib.import_module = watch\n"
        "load_onnxruntime()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 False"
