"""The way of a model from its source to a bundle: named stages over one context.

    load -> trace -> fuse -> compare with torch        (tracing.py)
    -> calibrate -> quantize -> judge -> measure -> other runtimes        (quantizing.py)
    -> write

With a recipe, the model is first compressed to a scratch folder, which is then loaded. All graphs run in the runtime
that ships.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, Quantization, Target
from ..runtime.errors import SessionError
from ..runtime.host.ort import can_start, load_onnxruntime
from ..runtime.sessions import providers
from ..targets import Profile
from . import libraries
from .compress.folder import without_figures
from .compress.processes import require_one
from .compress.recipe import Recipe, load_recipe
from .compress.run import Task, checkpoint_folder, compress_folder
from .compress.weights_int4 import WeightsInt4, require_agreement
from .config import ExportConfig
from .output import package, place
from .output.report import Measurements, build_report, write_report
from .source.loading import find_source, short_name
from .stages import Progress, StageRecord, run_stages

if TYPE_CHECKING:
    pass
from .context import Context
from .quantizing_stages import (
    calibrate,
    choose_arithmetic,
    judge_quantized,
    measure,
    quantize,
    write_for_other_runtimes,
)
from .tracing_stages import compare_with_torch, fuse, load, trace


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
    folder = find_source(config.model, config.revision)
    out = config.out or default_output(config.model, folder, profile.name)
    place.check_output(out, config.force)
    config.read_texts()
    scheme = config.quantization(profile)
    recipe = None if config.compress is None else load_recipe(config.compress)
    if recipe is not None and any(isinstance(step, WeightsInt4) for step in recipe.steps):
        require_agreement(config.scheme, f"the recipe {recipe.name}")
    with place.partial_folder(out) as work:
        context = Context(config, profile, scheme, folder, out, work, provider_of(profile))
        if recipe is not None:
            context.folder = _compress(context, recipe, progress)
        stages = [
            ("load", load),
            ("trace", trace),
            ("fuse", fuse),
            ("compare with torch", compare_with_torch),
            ("calibrate", calibrate),
            ("quantize", quantize),
            ("choose arithmetic", choose_arithmetic),
            ("judge", judge_quantized),
            ("measure", measure),
            ("other runtimes", write_for_other_runtimes),
        ]
        records = run_stages(context, stages, f"{config.model} for {profile.name}", progress)
        report: dict[str, Any] = {}

        def write(context: Context) -> None:
            report.update(_report(context, records))
            _write(context, report)
            place.put_in_place(context.result, out)

        run_stages(context, [("write", write)], f"{config.model} for {profile.name}", progress)
    return ExportResult(out, names.Bundle.open(out).manifest, report)


def default_output(model: str, folder: Path, target: str) -> Path:
    """In the working folder, or beside the model where that is the model's own folder, which is to hold no bundle."""
    name = f"{short_name(model)}-{target}"
    return folder.resolve().parent / name if folder.resolve() == Path.cwd().resolve() else Path(name)


def provider_of(profile: Profile) -> str:
    """The target's provider; for a GPU that is not here the CPU's, which can judge such a graph all the same.

    Raises: SessionError, for any other that is missing.
    """
    if can_start(profile.provider):
        return profile.provider
    if profile.provider == providers.CUDA:
        return providers.CPU
    raise SessionError(f"onnxruntime has no {profile.provider} here: install the onnxruntime package that has it")


def _compress(context: Context, recipe: Recipe, progress: Progress | None) -> Path:
    """The folder of the compressed model, from which the export then goes on as from any other."""
    require_one()
    config, folder = context.config, context.work / "compressed"
    folder.mkdir()
    task = Task(config.model, context.folder, recipe, context.profile, config.read_text())
    checkpoints = checkpoint_folder(context.out)
    compress_folder(task, folder, checkpoints, progress)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder


def _write(context: Context, report: dict[str, Any]) -> None:
    write_report(report, context.result)
    source = context.source
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        source=source.source,
        target=Target(context.profile.name, context.profile.settings()),
        compression=tuple(without_figures(step) for step in source.compression),
        quantization=Quantization(
            context.scheme,
            context.excluded,
            {} if context.arithmetic is None else context.arithmetic.activations,
            {} if context.weight_bits is None else context.weight_bits.bits,
        ),
        model=context.model(context.kv),
        tokens=source.tokens,
        quality={key: report[key] for key in ("against_source", "against_fp32")},
        files=package.digest_files(context.result),
        versions={
            **{name: importlib.metadata.version(name) for name in ("edgelm", "torch", "transformers", "onnx")},
            # It is installed as onnxruntime or as onnxruntime-gpu.
            "onnxruntime": str(load_onnxruntime().__version__),
        },
        notes=source.notes,
    )
    (context.result / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _report(context: Context, records: list[StageRecord]) -> dict[str, Any]:
    return build_report(
        Measurements(
            name=context.source.name,
            source=context.source.source,
            target=context.profile.name,
            scheme=context.scheme,
            model=context.model(context.kv),
            before=context.reference,
            after=context.result,
            speeds=context.speeds,
            against_source=context.source_agreement,
            against_fp32=context.quantized_agreement,
            examples=context.examples,
            arithmetic=None if context.arithmetic is None else context.arithmetic.measured(),
            weights=None if context.weight_bits is None else context.weight_bits.measured(),
            cache=context.cache_agreement,
            stages=records,
            path=context.path,
            refused_paths=context.refusals,
            sensitivity=context.sensitivity,
            without_genai=context.without_genai,
            compression=context.source.compression,
            not_run=context.not_run,
            notes=context.source.notes,
        )
    )
