"""The way of a model from its source to a bundle: named stages over one context.

    load -> trace -> fuse -> compare with torch -> calibrate -> quantize -> judge -> measure -> other runtimes -> write

With a recipe, the model is first compressed to a scratch folder, which is then loaded. The fp32 graph is written to a
scratch folder, because it is what torch is compared with, what calibrates the cache, what the quantized graphs are made
of, and what they are judged by. All of that runs in the runtime that ships.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..runtime import bundle as names
from ..runtime import machine, providers
from ..runtime.errors import SessionError, VerificationError
from ..runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CacheType,
    Exclusion,
    Manifest,
    Model,
    Quantization,
    Target,
)
from ..runtime.measure import Speed, measure_speed
from ..runtime.ort import can_start
from ..runtime.scoring import DEFAULT_WINDOW
from ..runtime.session import Session, make_session
from ..runtime.tokenizer import Tokenizer
from ..targets import Profile
from . import package, verify
from .blocks import BlockQuantizer, BlockSettings
from .cache_gate import CacheAgreement, calibrate_cache
from .cache_prompts import UnusualTokens, cache_prompts, unusual_tokens
from .calibrate import Ranges
from .compress.folder import without_figures
from .compress.processes import require_one
from .compress.recipe import Recipe, load_recipe
from .compress.run import Task, checkpoint_folder, compress_folder
from .compress.weights_int4 import SCHEME as WEIGHTS_SCHEME
from .compress.weights_int4 import WeightsInt4, noted_weights, require_agreement
from .config import ExportConfig
from .errors import RecipeError, TraceError
from .genai import write_genai_files
from .hessians import make_block_quantizer
from .passes import fusing_passes
from .paths import PATHS, TracePath
from .quantize import Quantizer
from .repair import Candidate, judge
from .report import Measurements, build_report, write_report
from .sensitivity import Sensitivity
from .source import SourceModel, describe_source, find_source, load_module, token_embedding
from .stages import Progress, StageRecord, run_stages
from .tokenizer_check import check_tokenizer
from .trace import TracedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEASURED_PROMPT = 128
_PROBE_NAME = "probe.onnx"


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where the bundle is, its manifest, and report.json's content."""

    path: Path
    manifest: Manifest
    report: dict[str, Any]


@dataclass
class _Context:
    """What the stages hand on. Fields without a default are set by the stage that is named beside them."""

    config: ExportConfig
    profile: Profile
    scheme: str
    folder: Path
    out: Path
    work: Path
    provider: str  # what the quantized graph runs on here: the target's provider, or the CPU's
    source: SourceModel = field(init=False)  # load
    module: PreTrainedModel | None = None  # load, until torch has answered
    text_ids: list[int] = field(init=False)  # load
    unusual: UnusualTokens = field(init=False)  # load
    blocks: BlockSettings | None = None  # load: how a compressed model's weights are to be stored
    kv: str = field(init=False)  # trace
    paths: Iterator[TracePath] = field(default_factory=lambda: iter(PATHS))
    path: str = field(init=False)  # trace
    refusals: list[str] = field(default_factory=list)  # trace, compare with torch
    shape: Model = field(init=False)  # trace
    graph: ir.Model | None = None  # trace, until it is written
    ranges: Ranges = field(default_factory=dict)  # calibrate
    cache_agreement: CacheAgreement | None = None  # calibrate
    quantizer: Quantizer = field(init=False)  # quantize
    source_agreement: verify.SourceAgreement = field(init=False)  # compare with torch
    quantized_agreement: verify.QuantizedAgreement | None = None  # judge
    sensitivity: tuple[Sensitivity, ...] = ()  # judge
    excluded: tuple[Exclusion, ...] = ()  # judge
    speeds: dict[str, Speed] = field(default_factory=dict)  # measure
    without_genai: str | None = None  # other runtimes: why onnxruntime-genai's files are not there

    @property
    def result(self) -> Path:
        """The folder that becomes the bundle."""
        return self.work / "bundle"

    @property
    def reference(self) -> Path:
        """The scratch folder of the fp32 graph."""
        return self.work / "fp32"

    @property
    def answers(self) -> Path:
        """The scratch folder of answers that others are held against."""
        return self.work / "answers"

    @property
    def not_run(self) -> tuple[str, ...]:
        """In words, what could not be tried on this machine."""
        wanted = self.profile.provider
        if self.provider == wanted:
            return ()
        return (
            f"nothing ran on {wanted}, which is not here: the graph was judged, and its speed measured, on "
            f"{self.provider}",
        )

    def model(self, kv: str) -> Model:
        """The manifest's description of the model with a cache of this type."""
        return replace(self.shape, kv=CacheType(kv, "channel" if kv == "int8" else None))

    @contextmanager
    def session(self, folder: Path, kv: str, graph: str = names.GRAPH_NAME) -> Iterator[Session]:
        """The shipping runtime over a graph that was written: the quantized one on the target's provider, if it is
        here, the fp32 graph and all that is made of it for trial on the CPU."""
        provider = self.provider if folder == self.result else providers.CPU
        session = make_session(folder / graph, self.model(kv), machine.default_threads(), [provider])
        try:
            yield session
        finally:
            session.close()


def export_model(config: ExportConfig, progress: Progress | None = None) -> ExportResult:
    """Export a model to a bundle. Either the whole bundle is in place afterwards, or nothing is.

    Raises: SourceError, RecipeError, TraceError, VerificationError (outside the target's tolerances), OutputError,
    StageError. Cost: two to four times the size of the fp32 weights in memory; one minute for 135M parameters.
    """
    profile = config.profile()
    folder = find_source(config.model, config.revision)
    out = config.out or Path(f"{_short_name(config.model)}-{profile.name}")
    package.check_output(out, config.force)
    config.read_text()
    scheme = config.quantization(profile)
    recipe = None if config.compress is None else load_recipe(config.compress)
    if recipe is not None and any(isinstance(step, WeightsInt4) for step in recipe.steps):
        require_agreement(config.scheme, f"the recipe {recipe.name}")
    with package.partial_folder(out) as work:
        context = _Context(config, profile, scheme, folder, out, work, _provider(profile))
        if recipe is not None:
            context.folder = _compress(context, recipe, progress)
        stages = [
            ("load", _load),
            ("trace", _trace),
            ("fuse", _fuse),
            ("compare with torch", _compare),
            ("calibrate", _calibrate),
            ("quantize", _quantize),
            ("judge", _judge),
            ("measure", _measure),
            ("other runtimes", _other_runtimes),
        ]
        records = run_stages(context, stages, f"{config.model} for {profile.name}", progress)
        report: dict[str, Any] = {}

        def write(context: _Context) -> None:
            report.update(_report(context, records))
            _write(context, report)
            package.put_in_place(context.result, out)

        run_stages(context, [("write", write)], f"{config.model} for {profile.name}", progress)
    return ExportResult(out, names.Bundle.open(out).manifest, report)


def _provider(profile: Profile) -> str:
    """The target's provider; for a GPU that is not here the CPU's, which can judge such a graph all the same.

    Raises: SessionError, for any other that is missing.
    """
    if can_start(profile.provider):
        return profile.provider
    if profile.provider == providers.CUDA:
        return providers.CPU
    raise SessionError(f"onnxruntime has no {profile.provider} here: install the onnxruntime package that has it")


def _compress(context: _Context, recipe: Recipe, progress: Progress | None) -> Path:
    """The folder of the compressed model, from which the export then goes on as from any other."""
    require_one()
    config, folder = context.config, context.work / "compressed"
    folder.mkdir()
    task = Task(config.model, context.folder, recipe, context.profile, config.read_text())
    checkpoints = checkpoint_folder(context.out)
    compress_folder(task, folder, checkpoints, progress)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder


def _load(context: _Context) -> None:
    module = load_module(context.folder)
    context.module, context.source = module, describe_source(context.config.model, context.folder, module)
    context.blocks = noted_weights(module)
    if context.blocks is not None:
        require_agreement(context.config.scheme, f"{context.config.model} was compressed with weights-int4, which")
        context.scheme = WEIGHTS_SCHEME
    for folder in (context.result, context.reference, context.answers):
        folder.mkdir()
    package.write_tokenizer(context.source.tokenizer, module, context.result)
    text = context.config.read_text()
    bundled = Tokenizer(context.result / names.TOKENIZER_NAME)
    check_tokenizer(context.source.tokenizer, bundled, text)
    context.text_ids = bundled.encode(text)
    context.unusual = _unusual_tokens(context, module)
    # A text that fills no window of the scoring would give figures that say less than they seem to.
    needed = min(DEFAULT_WINDOW, context.source.context_length)
    if len(context.text_ids) < needed:
        raise RecipeError(
            f"{context.config.text or 'the text that comes with edgelm'} has {len(context.text_ids)} tokens, too few "
            f"to judge this model by: give a text of {needed} or more with --text"
        )


def _unusual_tokens(context: _Context, module: PreTrainedModel) -> UnusualTokens:
    """Rows behind the tokenizer's last token are padding, and in nobody's text."""
    source, embedding = context.source, token_embedding(module)
    rows = embedding.weight.detach()[: min(source.vocab_size, len(source.tokenizer))]
    return unusual_tokens(source.tokenizer, source.tokens.bos, rows, context.result)


def _trace(context: _Context) -> None:
    """Trace on the first path, of those that were not tried yet, that the model can go."""
    if context.module is None:
        context.module = load_module(context.folder)
    for name, trace in context.paths:
        try:
            traced = trace(context.module)
        except TraceError as error:
            context.refusals.append(f"{name}: {error}")
            continue
        context.path, context.graph, context.shape = name, traced.graph, _shape(context.source, traced)
        context.kv = _cache_type(context)
        return
    raise TraceError(f"{context.config.model} cannot be exported. " + ". ".join(context.refusals))


def _shape(source: SourceModel, traced: TracedModel) -> Model:
    return Model(
        vocab_size=source.vocab_size,
        context_length=source.context_length,
        parameters=source.parameters,
        layers=traced.layers,
        kv=CacheType("float32", None),
        cache_layout=traced.layout,
        states=traced.states,
        step_tokens=traced.step_tokens,
    )


def _cache_type(context: _Context) -> str:
    """What was asked for, else the scheme's default; but only a fused operator can read an INT8 cache."""
    wanted = context.config.kv or context.profile.kv[context.scheme]
    if context.shape.cache_layout == "in_place" or wanted == "float32":
        return wanted
    if context.profile.activations == "float16":
        raise TraceError(
            f"{context.config.model}'s attention is not fused, which float16 activations need: export it for a CPU"
        )
    if context.config.kv is not None:
        raise RecipeError("this model's attention is not fused, so its cache cannot be int8: leave --kv out")
    return "float32"


def _fuse(context: _Context) -> None:
    assert context.graph is not None, "set when the model was traced"
    ir.passes.PassManager(fusing_passes(context.source.context_length))(context.graph)
    _save(context.graph, context.reference)
    context.graph = None  # it is read from its file from now on; this one holds on to torch's weights


def _compare(context: _Context) -> None:
    """The trial: a path on which the graph does not answer as torch does is given up for the next one."""
    while True:
        answers = _ask_torch(context)
        try:
            with context.session(context.reference, "float32") as session:
                context.source_agreement = verify.compare_with_source(answers, session, context.profile.gate)
            return
        except (VerificationError, SessionError) as error:
            context.refusals.append(f"{context.path}: {error}")
        _trace(context)
        _fuse(context)


def _ask_torch(context: _Context) -> verify.SourceAnswers:
    """torch's answers; its weights are let go then, so that the same weights are not in memory twice when onnxruntime
    loads them. Another path, which few models need, loads them again."""
    assert context.module is not None, "set when the model was traced"
    answers = verify.ask_source(context.module, context.text_ids, context.model("float32"), context.answers)
    # By themselves they would stay: onnxscript's rules for rewriting remember the last graph that they saw.
    for weight in context.module.parameters():
        weight.data = weight.new_empty(0)
    context.module = None
    return answers


def _calibrate(context: _Context) -> None:
    if context.kv == "int8":
        source = context.source
        prompts = cache_prompts(context.text_ids, context.unusual, source.vocab_size, source.context_length)
        reference = partial(context.session, context.reference, "float32")
        context.ranges, context.cache_agreement = calibrate_cache(
            reference, partial(_cache_probe, context), prompts, context.profile.gate, context.answers
        )


@contextmanager
def _cache_probe(context: _Context, ranges: Ranges) -> Iterator[Session]:
    """A session on the fp32 graph with an INT8 cache, which reads the weights in the fp32 graph's file."""
    graph = Quantizer(context.reference / names.GRAPH_NAME, "fp32", context.profile.weight_bits, ranges).quantized()
    with _written_probe(context, graph, "int8") as session:
        yield session


def _quantize(context: _Context) -> None:
    context.quantizer = Quantizer(
        context.reference / names.GRAPH_NAME,
        context.scheme,
        context.profile.weight_bits,
        context.ranges,
        context.profile.activations,
        None if context.blocks is None else _block_quantizer(context, context.blocks),
    )
    _write_quantized(context, ())


def _block_quantizer(context: _Context, settings: BlockSettings) -> BlockQuantizer:
    """The quantizer of a model that was compressed with `weights-int4`, with what its method needs."""
    graph = context.reference / names.GRAPH_NAME
    return make_block_quantizer(settings, graph, context.text_ids, context.source.context_length)


def _write_quantized(context: _Context, excluded: Collection[str]) -> None:
    """The bundle's graph and weights, with the matrices of these names left in float32."""
    _save(context.quantizer.quantized(excluded), context.result)


@contextmanager
def _probe(context: _Context, quantized: Collection[str]) -> Iterator[Session]:
    """A session on the fp32 graph with these matrices quantized, which reads all others in the fp32 graph's file."""
    with _written_probe(context, context.quantizer.alone(quantized), "float32") as session:
        yield session


@contextmanager
def _written_probe(context: _Context, graph: ir.Model, kv: str) -> Iterator[Session]:
    ir.save(graph, context.reference / _PROBE_NAME)
    try:
        with context.session(context.reference, kv, _PROBE_NAME) as session:
            yield session
    finally:
        (context.reference / _PROBE_NAME).unlink()


def _judge(context: _Context) -> None:
    if context.scheme == "fp32" and context.kv == "float32":
        return
    candidate = Candidate(
        reference=partial(context.session, context.reference, "float32"),
        reference_bytes=(context.reference / names.WEIGHTS_NAME).stat().st_size,
        quantized=partial(context.session, context.result, context.kv),
        write=partial(_write_quantized, context),
        probe=partial(_probe, context),
        matrices=context.quantizer.matrices,
    )
    window = verify.usable_window(context.source.context_length, len(context.text_ids), DEFAULT_WINDOW)
    verdict = judge(candidate, context.text_ids, window, context.profile.gate)
    context.quantized_agreement = verdict.agreement
    context.sensitivity, context.excluded = verdict.sensitivity, verdict.excluded


def _measure(context: _Context) -> None:
    room = max(1, min(_MEASURED_PROMPT, context.source.context_length - 1))
    prompt = (context.text_ids * (1 + room // len(context.text_ids)))[:room]
    for name, folder, kv in (("before", context.reference, "float32"), ("after", context.result, context.kv)):
        with context.session(folder, kv) as session:
            context.speeds[name] = measure_speed(session, prompt)


def _other_runtimes(context: _Context) -> None:
    if context.profile.provider != providers.CPU:
        context.without_genai = "its files are written for CPUs: none was tried on a GPU"
        return
    context.without_genai = write_genai_files(context.result, context.model(context.kv), context.source.tokens)


def _write(context: _Context, report: dict[str, Any]) -> None:
    write_report(report, context.result)
    source = context.source
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        source=source.source,
        target=Target(context.profile.name, context.profile.settings()),
        compression=tuple(without_figures(step) for step in source.compression),
        quantization=Quantization(context.scheme, context.excluded),
        model=context.model(context.kv),
        tokens=source.tokens,
        quality={key: report[key] for key in ("against_source", "against_fp32")},
        files=package.digest_files(context.result),
        versions={
            name: importlib.metadata.version(name)
            for name in ("edgelm", "torch", "transformers", "onnx", "onnxruntime")
        },
    )
    (context.result / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _report(context: _Context, records: list[StageRecord]) -> dict[str, Any]:
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
            cache=context.cache_agreement,
            stages=records,
            path=context.path,
            refused_paths=context.refusals,
            sensitivity=context.sensitivity,
            without_genai=context.without_genai,
            compression=context.source.compression,
            not_run=context.not_run,
        )
    )


def _save(graph: ir.Model, folder: Path) -> None:
    """Write graph and weights. Weights are made one at a time, as they are written. torch's notes on nodes, stack
    traces with paths of this machine, stay out."""
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    ir.save(graph, folder / names.GRAPH_NAME, external_data=names.WEIGHTS_NAME)


def _short_name(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
