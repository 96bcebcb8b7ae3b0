"""Shared fixtures: tiny models built in code, bundles exported once a run, the optional shared data."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from edgelm.export.gate.quality import QuantizedAgreement
    from edgelm.runtime import Engine
    from edgelm.runtime.sessions.protocol import Session
    from edgelm.targets import Gate

# Tests never use the network; transformers and huggingface_hub read this at import.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test reads or fills the user's own caches. This folder serves fixtures that outlive a test.
os.environ["EDGELM_HOME"] = tempfile.mkdtemp(prefix="edgelm-home-")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# x86-cpu with looser limits, for models of random weights: their distributions are so flat that INT8 exceeds the
# target's limits.
WIDE_TARGET = str(Path(os.environ["EDGELM_HOME"]) / "wide.toml")
Path(WIDE_TARGET).write_text(
    'extends = "x86-cpu"\nname = "x86-cpu"\n[gate]\nmean_kl = 0.2\np99_kl = 3.0\nperplexity_increase_percent = 8.0\n'
    "answers_percent = 80.0\ncache_kl_limit = 0.02\n",
    encoding="utf-8",
)
# Environment variables: a folder that holds the real model already, and whether its tests may be skipped.
REAL_MODEL, REQUIRE = "EDGELM_REAL_MODEL", "EDGELM_REQUIRE"
_EXPORT_S = 1800

# Files that take over 30 seconds each, three quarters of the total. They run with --all or when named.
LONG = {
    "test_blocks",
    "test_compress",
    "test_compress_bundles",
    "test_compress_run",
    "test_cuda",
    "test_decompositions",
    "test_emulated",
    "test_exactness",
    "test_export_input",
    "test_genai",
    "test_kernels",
    "test_models",
    "test_plain",
    "test_pythons",
    "test_real_bundle",
    "test_real_quality",
    "test_stories",
    "test_trace",
    "test_training",
    "test_weight_bits",
    "test_whole_exports",
}

# Simple English, long enough to calibrate and judge tiny models.
TEXT = (ROOT / "export" / "text" / "default.txt").read_text(encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the files that take long")
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes each")
    parser.addoption("--bundles", type=Path, help="folder of exported bundles, for machines that cannot export")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["EDGELM_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def edgelm_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for each test, so that no test answers from another's cache."""
    home = tmp_path_factory.mktemp("home") / "edgelm"
    monkeypatch.setenv("EDGELM_HOME", str(home))
    return home


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files named on the command line always run.
    named = any(argument.partition("::")[0].endswith(".py") for argument in config.args)
    if not config.getoption("--all") and not named:
        config.hook.pytest_deselected(items=[item for item in items if item.path.stem in LONG])
        items[:] = [item for item in items if item.path.stem not in LONG]
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


def shared(path: str) -> Path:
    """A file or folder of the shared data; skips or fails the test, as `missing` does, if it is absent."""
    found = SHARED / path
    if not found.exists():
        missing(f"no shared data: {path}")
    return found


def byte_tokenizer(folder: Path, vocab_size: int = 257) -> None:
    """Write a tokenizer of single bytes (ids 0 to 255) and an end token (256) in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert vocab_size >= len(alphabet) + 1
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written as transformers writes it, because transformers is not installed on every machine that runs tests.
    named = {"backend": "tokenizers", "bos_token": "<end>", "eos_token": "<end>"}
    settings = {**named, "model_max_length": 10**30, "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tiny_llama(**changes: Any) -> Any:
    """A random Llama of two layers, head size 16, with logits far enough apart that there are no near-ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """More threads do not speed up tiny models, and those of torch compete with those of onnxruntime."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


def compare_texts(
    before: Session, after: Session, token_ids: Sequence[int], window: int, gate: Gate
) -> QuantizedAgreement:
    """Compare two graphs on a text in windows, as the gate does."""
    from edgelm.export.gate.judging import Judging
    from edgelm.export.gate.quality import measure
    from edgelm.export.gate.reference import observe

    windows = [list(token_ids[begin : begin + window]) for begin in range(0, len(token_ids), window)]
    judging = Judging(tuple(("text", ids) for ids in windows if len(ids) > 1), (), (), before.step([0]).shape[1])
    with tempfile.TemporaryDirectory() as folder:
        return measure(observe(before, judging, window, Path(folder)), after, gate)


def on_a_small_disk(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that mounts a small disk on its argument, `folder`, in a mount namespace that ends with it. Skips
    the test where this user cannot mount."""
    alone = ["unshare", "--mount"]
    probe = [*alone, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user cannot mount a small disk")
    command = [*alone, sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def require_kernels(patch: pytest.MonkeyPatch) -> None:
    """Use the compiled kernels in what is opened from now on; calls `missing` if there are none."""
    if importlib.util.find_spec("edgelm_kernels") is None:
        missing("edgelm-kernels is not installed")
    from edgelm.runtime.sessions import kernels

    patch.setenv(kernels.SWITCH, "on")
    if kernels.identity() is None:
        missing("edgelm-kernels has no code for this processor")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the compiled kernels from a test of what onnxruntime computes: they are used wherever they are installed."""
    from edgelm.runtime.sessions import kernels

    monkeypatch.setenv(kernels.SWITCH, "off")


def ready_bundle(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """The bundle of a shared model in the folder given by `--bundles`; skips the test if it is not there."""
    found = folder / "-".join([name, *(f"{key}-{value}" for key, value in sorted(settings.items()))])
    if not found.exists():
        pytest.skip(f"no bundle {found.name} was exported beforehand")
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face's format with a tiny random Llama and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def export_tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export the tiny model, once a run for each set of settings; returns the bundle's folder."""
    ready = request.config.getoption("--bundles")
    if ready is not None:
        return lambda **settings: ready_bundle(ready, "tiny", settings)
    from edgelm.export import ExportConfig, export_model

    tiny_model = request.getfixturevalue("tiny_model")
    done: dict[tuple[tuple[str, Any], ...], Path] = {}

    def export(**settings: Any) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("bundle") / "tiny"
            done[key] = export_model(ExportConfig(str(tiny_model), target=WIDE_TARGET, out=out, **settings)).path
        return done[key]

    return export


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: Callable[..., Path]) -> Path:
    """The tiny model with the default scheme, row-wise INT8, and an INT8 cache. Read only: copy it to change it."""
    return export_tiny()


@pytest.fixture(scope="session")
def stories_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export the shared stories260k with a scheme, once a run; returns the bundle's folder."""
    ready = request.config.getoption("--bundles")
    if ready is not None:
        return lambda scheme: ready_bundle(ready, "stories260k", {"scheme": scheme})
    from edgelm.export import ExportConfig, export_model

    done: dict[str, Path] = {}

    def export(scheme: str) -> Path:
        if scheme not in done:
            model = shared("models/stories260k")
            out = tmp_path_factory.mktemp("stories") / scheme
            done[scheme] = export_model(ExportConfig(str(model), target="x86-cpu", scheme=scheme, out=out)).path
        return done[scheme]

    return export


def missing(reason: str) -> NoReturn:
    """Skip the test because something is not installed; with EDGELM_REQUIRE=all, fail it."""
    if os.environ.get(REQUIRE) == "all":
        pytest.fail(f"{reason}, and {REQUIRE}=all asks for it", pytrace=False)
    pytest.skip(reason)


def real_model_script() -> ModuleType:
    """scripts/real_model.py as a module."""
    spec = importlib.util.spec_from_file_location("real_model", ROOT / "scripts" / "real_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct. It is never fetched here: tests do not use the network."""
    named = os.environ.get(REAL_MODEL)
    if named is not None:
        if not (Path(named) / "model.safetensors").is_file():
            missing(f"{REAL_MODEL} names {named}, which holds no model.safetensors")
        return Path(named)
    script = real_model_script()
    if not script.is_complete(script.FOLDER):
        missing("no real model: python scripts/real_model.py fetches it")
    folder: Path = script.FOLDER
    return folder


@pytest.fixture(scope="session")
def real_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model exported with default settings, once a run: parallel test processes share it. Read only."""
    ready = request.config.getoption("--bundles")
    if ready is not None:
        return ready_bundle(ready, "real", {})
    from edgelm.export import ExportConfig, export_model
    from edgelm.runtime.host.file_lock import locked

    model = request.getfixturevalue("real_model")
    # Each process of xdist has its own folder below the run's folder.
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real-bundle"
    with locked(out.with_suffix(".lock"), _EXPORT_S):
        if not out.exists():
            export_model(ExportConfig(str(model), target="x86-cpu", out=out))
    return out


@pytest.fixture(scope="module")
def engine_of(
    export_tiny: Callable[..., Path], stories_bundle: Callable[[str], Path]
) -> Iterator[Callable[[str], Engine]]:
    """Engines by name, each opened once a file, without response or prefix cache. Names with kernels use them whatever
    `EDGELM_KERNELS` says; without kernels, their tests are skipped."""
    from edgelm.runtime import load

    folders: dict[str, Callable[[], Path]] = {
        "int8 cache": export_tiny,
        "float32 cache": lambda: export_tiny(kv="float32"),
        "float32 cache, kernels": lambda: export_tiny(kv="float32"),
        "stories260k": lambda: stories_bundle("int8-rowwise"),
    }
    opened: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in opened:
            with pytest.MonkeyPatch.context() as patch:
                if name.endswith("kernels"):
                    require_kernels(patch)
                opened[name] = load(folders[name](), threads=1, response_cache=False, prefix_cache=False)
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


@pytest.fixture(scope="module")
def clients() -> Iterator[None]:
    """Make the packages that scripts/setup_clients installed importable, after the environment's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "build" / "clients")])
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the project, so that no build folder of the working tree gets in."""
    source = tmp_path_factory.mktemp("source") / "edgelm"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__"))
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built
