"""Export a model from its source to a bundle, in named stages.

    load -> trace -> fuse -> compare with torch                                               (fp32_graph.py)
    -> calibrate -> quantize -> choose weights -> choose arithmetic -> judge
    -> measure -> other runtimes                                                              (quantized_graph.py)
    -> write

With a recipe, the model is first compressed to a scratch folder, which is then loaded. Only `int4-rowwise` chooses
weights. All graphs run in the shipping runtime.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, Quantization, Target
from ..runtime.errors import SessionError
from ..runtime.host.ort import can_start, load_onnxruntime
from ..runtime.sessions import kernels, providers
from ..targets import Profile
from . import libraries
from .compress.processes import require_one
from .compress.recipe import load_recipe
from .compress.run import Task, checkpoint_folder, compress_folder
from .compress.steps.weights_int4 import WeightsInt4, require_agreement
from .config import ExportConfig
from .fp32_graph import load, make_fp32_graph
from .output import package, place
from .output.report import Measurements, build_report, write_report
from .quantized_graph import make_quantized_graph
from .records import Fp32Graph, Job, Loaded, QuantizedGraph
from .source.compressed import without_figures
from .source.finding import find_source, short_name
from .stages import Progress, StageRecord, Stages


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where the bundle is, its manifest, and report.json's content."""

    path: Path
    manifest: Manifest
    report: dict[str, Any]


def export_model(config: ExportConfig, progress: Progress | None = None) -> ExportResult:
    """Export a model to a bundle. Either the whole bundle is in place afterwards, or nothing is.

    Raises: SourceError, RecipeError, TraceError, VerificationError (outside the target's tolerances), OutputError,
    StageError. Cost: two to four times the size of the fp32 weights in memory; one minute for 135M parameters.
    """
    libraries.redirect()
    profile = config.profile()
    provider = provider_of(profile)
    folder = find_source(config.model, config.revision)
    out = config.out or default_output(config.model, folder, profile.name)
    place.check_output(out, config.force)
    config.read_texts()
    scheme = config.quantization(profile)
    recipe = None if config.compress is None else load_recipe(config.compress)
    if recipe is not None and any(isinstance(step, WeightsInt4) for step in recipe.steps):
        require_agreement(config.scheme, f"the recipe {recipe.name}")
    stages = Stages(f"{config.model} for {profile.name}", progress)
    with place.partial_folder(out) as work:
        if recipe is not None:
            task = Task(config.model, folder, recipe, profile, config.compression_texts())
            folder = _compress(task, work, out, progress)
        job = Job(config, profile, folder, work, provider)
        with stages.stage("load"):
            loaded, module = load(job, scheme)
        fp32 = make_fp32_graph(job, loaded, module, stages)
        quantized = make_quantized_graph(loaded, fp32, stages)
        report = _report(loaded, fp32, quantized, stages.records)
        with stages.stage("write"):
            _write(loaded, fp32, quantized, report)
            place.put_in_place(job.bundle, out)
    return ExportResult(out, names.Bundle.open(out).manifest, report)


def default_output(model: str, folder: Path, target: str) -> Path:
    """The default output: in the working folder, or beside the model if the working folder is the model's own."""
    name = f"{short_name(model)}-{target}"
    return folder.resolve().parent / name if folder.resolve() == Path.cwd().resolve() else Path(name)


def provider_of(profile: Profile) -> str:
    """The target's provider; for a GPU that is not here the CPU's, which can also judge such a graph.

    Raises: SessionError, for any other that is missing, or if the installed kernels cannot be used. It is called before
    the work, since each way to trace would fail by that.
    """
    kernels.identity()
    if can_start(profile.provider):
        return profile.provider
    if profile.provider == providers.CUDA:
        return providers.CPU
    raise SessionError(f"onnxruntime has no {profile.provider} here: install the onnxruntime package that has it")


def _compress(task: Task, work: Path, out: Path, progress: Progress | None) -> Path:
    """Compress the model. Returns the folder of the compressed model, which is then exported like any other."""
    require_one()
    folder = work / "compressed"
    folder.mkdir()
    checkpoints = checkpoint_folder(out)
    compress_folder(task, folder, checkpoints, progress, progress.say if progress is not None else lambda _: None)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder


def _write(loaded: Loaded, fp32: Fp32Graph, quantized: QuantizedGraph, report: dict[str, Any]) -> None:
    job, source = fp32.job, loaded.source
    write_report(report, job.bundle)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        source=source.source,
        target=Target(job.profile.name, job.profile.settings()),
        compression=tuple(without_figures(step) for step in source.compression),
        quantization=Quantization(
            loaded.scheme,
            () if quantized.verdict is None else quantized.verdict.excluded,
            {} if quantized.arithmetic is None else quantized.arithmetic.activations,
            {} if quantized.weights is None else quantized.weights.bits,
        ),
        model=fp32.model(fp32.kv),
        tokens=source.tokens,
        quality={key: report[key] for key in ("against_source", "against_fp32")},
        files=package.digest_files(job.bundle),
        versions={
            **{name: importlib.metadata.version(name) for name in ("edgelm", "torch", "transformers", "onnx")},
            # The package is called onnxruntime or onnxruntime-gpu.
            "onnxruntime": str(load_onnxruntime().__version__),
        },
        notes=source.notes,
    )
    (job.bundle / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _report(
    loaded: Loaded, fp32: Fp32Graph, quantized: QuantizedGraph, records: Sequence[StageRecord]
) -> dict[str, Any]:
    job, source, verdict = fp32.job, loaded.source, quantized.verdict
    return build_report(
        Measurements(
            name=source.name,
            source=source.source,
            target=job.profile.name,
            scheme=loaded.scheme,
            model=fp32.model(fp32.kv),
            before=job.fp32,
            after=job.bundle,
            speeds=quantized.speeds,
            against_source=fp32.agreement,
            against_fp32=None if verdict is None else verdict.agreement,
            examples=quantized.examples,
            arithmetic=None if quantized.arithmetic is None else quantized.arithmetic.measured(),
            weights=None if quantized.weights is None else quantized.weights.measured(),
            cache=quantized.cache,
            stages=records,
            path=fp32.path,
            refused_paths=fp32.refusals,
            sensitivity=() if verdict is None else verdict.sensitivity,
            without_genai=quantized.without_genai,
            compression=source.compression,
            not_run=job.not_run,
            notes=source.notes,
        )
    )
