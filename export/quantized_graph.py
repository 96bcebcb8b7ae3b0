"""From the fp32 graph to the one that ships: calibrate, quantize, choose weights (`int4-rowwise`), choose arithmetic,
judge, measure, other runtimes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.evaluation.speed import Speed, measure_speed
from ..runtime.sessions import providers
from ..runtime.sessions.protocol import Session
from ..runtime.text.tokenizer import Tokenizer
from ..targets import Gate
from ..targets.abilities import MIXED_SCHEME
from .gate.arithmetic import WINDOW_TOKENS, Arithmetic, choose_activations, wide_everywhere
from .gate.cache_judge import CacheAgreement, calibrate_cache
from .gate.cache_prompts import cache_prompts
from .gate.reference import write_answers
from .gate.repair import Attempt, Candidate, Verdict, judge
from .gate.weight_bits import WeightBits
from .output.genai import write_genai_files
from .passes.quantize_linears import ROWWISE_SCHEMES
from .passes.widen_activations import WidenActivations, matrices_of
from .quantization.calibration import Ranges
from .quantization.hessians import make_block_quantizer
from .quantization.quantizer import Quantizer
from .quantization.rounding import round_matrices
from .records import Fp32Graph, Loaded, QuantizedGraph, save_graph
from .stages import Stages
from .weight_choice import choose_weights

_MEASURED_PROMPT = 128
# Decode steps for each run of the prompt. These figures are for the report; `edgelm bench` measures longer.
_MEASURED_STEPS = 8
_PROBE_NAME = "probe.onnx"
_EXAMPLES = 8


def make_quantized_graph(loaded: Loaded, fp32: Fp32Graph, stages: Stages) -> QuantizedGraph:
    """Write the bundle's graph and weights, and measure them. Raises: VerificationError."""
    with stages.stage("calibrate"):
        ranges, cache = calibrate(loaded, fp32)
    with stages.stage("quantize"):
        quantizer = make_quantizer(loaded, fp32, ranges)
        save_graph(quantizer.quantized(), fp32.job.bundle)
    weights: WeightBits | None = None
    if loaded.scheme == MIXED_SCHEME:
        with stages.stage("choose weights"):
            weights, quantizer = choose_weights(loaded, fp32, quantizer)
    with stages.stage("choose arithmetic"):
        chosen = _choose_arithmetic(loaded, fp32)
    with stages.stage("judge"):
        verdict, arithmetic = _judge(loaded, fp32, quantizer, chosen, _gate(loaded, fp32, weights))
        examples = [] if verdict is None else _examples(loaded, fp32, verdict)
    with stages.stage("measure"):
        speeds = _measure(loaded, fp32)
    with stages.stage("other runtimes"):
        without_genai = _write_for_other_runtimes(loaded, fp32)
    return QuantizedGraph(cache, weights, arithmetic, verdict, examples, speeds, without_genai)


def calibrate(loaded: Loaded, fp32: Fp32Graph) -> tuple[Ranges, CacheAgreement | None]:
    """The ranges of an INT8 cache, judged on prompts that did not calibrate them. Raises: VerificationError."""
    if fp32.kv != "int8":
        return {}, None
    source, job = loaded.source, fp32.job
    prompts = cache_prompts(loaded.text_ids, loaded.unusual, source.vocab_size, source.context_length)
    probe = partial(_cache_probe, fp32)
    return calibrate_cache(fp32.session, probe, prompts, job.profile.gate, job.answers)


@contextmanager
def _cache_probe(fp32: Fp32Graph, ranges: Ranges) -> Iterator[Session]:
    """A session on the fp32 graph with an INT8 cache, over the fp32 graph's weights file."""
    graph = Quantizer(fp32.graph, "fp32", fp32.job.profile.weight_bits, ranges).quantized()
    with _written_probe(fp32, graph, "int8") as session:
        yield session


def make_quantizer(loaded: Loaded, fp32: Fp32Graph, ranges: Ranges) -> Quantizer:
    profile, length = fp32.job.profile, loaded.source.context_length
    rounded: Mapping[str, Path] = {}
    # If all matrices become 4 bits, their rounding to 8 bits does not matter.
    kept = loaded.scheme != MIXED_SCHEME or fp32.job.config.has_budget
    if loaded.scheme in ROWWISE_SCHEMES and kept and fp32.can_calibrate:
        limit = (1 << (profile.weight_bits - 1)) - 1
        rounded = round_matrices(fp32.graph, loaded.calibrating_ids, length, limit, fp32.job.answers)
    # A model that was compressed with `weights-int4` has its own block settings.
    blocks = None if loaded.blocks is None else make_block_quantizer(loaded.blocks, fp32.graph, loaded.text_ids, length)
    return Quantizer(fp32.graph, loaded.scheme, profile.weight_bits, ranges, profile.activations, blocks, rounded)


def _choose_arithmetic(loaded: Loaded, fp32: Fp32Graph) -> Arithmetic | None:
    """Choose 8 or 16 bits for the activations of each matrix in the row-wise schemes; None for other schemes. A model
    that is fed token by token has 16 everywhere: it has no long steps in which 8 would save time."""
    if loaded.scheme not in ROWWISE_SCHEMES:
        return None
    matrices = matrices_of(ir.load(fp32.job.bundle / names.GRAPH_NAME))
    if fp32.shape.step_tokens is not None:
        return wide_everywhere(matrices)
    probe = partial(_arithmetic_probe, fp32, frozenset(matrices))
    budget = fp32.job.profile.gate.activations_kl
    tokens = min(WINDOW_TOKENS, loaded.source.context_length)
    return choose_activations(matrices, probe, loaded.calibrating_ids, budget, tokens)


@contextmanager
def _arithmetic_probe(fp32: Fp32Graph, matrices: frozenset[str], narrow: Collection[str]) -> Iterator[Session]:
    """A session on the bundle's graph in which these matrices have activations of 8 bits, and all others of 16."""
    folder = fp32.job.bundle
    ir.save(_with_wide(folder, matrices.difference(narrow)), folder / _PROBE_NAME)
    try:
        with fp32.bundle_session(_PROBE_NAME) as session:
            yield session
    finally:
        (folder / _PROBE_NAME).unlink()


def _with_wide(bundle: Path, wide: Collection[str]) -> ir.Model:
    """The bundle's graph, over the written weights, with activations of 16 bits for only these matrices."""
    graph = ir.load(bundle / names.GRAPH_NAME)
    ir.passes.PassManager([WidenActivations(wide)])(graph)
    return graph


def _judge(
    loaded: Loaded, fp32: Fp32Graph, quantizer: Quantizer, chosen: Arithmetic | None, gate: Gate
) -> tuple[Verdict | None, Arithmetic | None]:
    """The gate: judge the quantized graph, and repair it if possible. Returns also the arithmetic that passed. Raises:
    VerificationError."""
    if loaded.scheme == "fp32" and fp32.kv == "float32":
        return None, None
    job = fp32.job
    ways = _ways_to_compute(chosen)
    candidate = Candidate(
        reference=fp32.session,
        reference_bytes=(job.fp32 / names.WEIGHTS_NAME).stat().st_size,
        quantized=fp32.bundle_session,
        attempts=[_attempt(name, way, fp32, quantizer) for name, way in ways.items()],
        leave_out=None if chosen is not None else lambda left: save_graph(quantizer.quantized(left), job.bundle),
        remedy="--kv float32, --scheme int8-weight or --scheme fp32" if fp32.kv == "int8" else "--scheme fp32",
        matrices=quantizer.matrices,
    )
    verdict = judge(candidate, loaded.judging, loaded.source.context_length, gate, job.answers)
    return verdict, ways[verdict.attempt]


def _gate(loaded: Loaded, fp32: Fp32Graph, weights: WeightBits | None) -> Gate:
    """The scheme's limits; those of chosen bits follow from them, and all from a loss that the user states."""
    job = fp32.job
    gate = job.profile.gate_of(loaded.scheme)
    if weights is not None:
        gate = gate.of_bits(8 * weights.weights_bytes / fp32.shape.parameters)
    return gate if job.config.max_kl is None else gate.allowing(job.config.max_kl)


def _ways_to_compute(chosen: Arithmetic | None) -> dict[str, Arithmetic | None]:
    """The attempts by their names in errors: the chosen arithmetic, then 16 bits everywhere; for other schemes the
    written graph."""
    if chosen is None:
        return {"with all matrices quantized": None}
    ways: dict[str, Arithmetic | None] = {"with activations of 16 bits everywhere": chosen.widened()}
    if set(chosen.activations.values()) == {16}:
        return ways
    return {"with activations of 8 and 16 bits": chosen, **ways}


def _attempt(name: str, way: Arithmetic | None, fp32: Fp32Graph, quantizer: Quantizer) -> Attempt:
    """An attempt differs from the written graph only in the activations; the weights stay."""
    if way is None:
        return Attempt(name, lambda: None, partial(_probe, fp32, quantizer, ()))
    wide, bundle = way.wide(), fp32.job.bundle

    def write() -> None:
        ir.save(_with_wide(bundle, wide), bundle / names.GRAPH_NAME)

    return Attempt(name, write, partial(_probe, fp32, quantizer, wide))


@contextmanager
def _probe(
    fp32: Fp32Graph, quantizer: Quantizer, wide: Collection[str], quantized: Collection[str]
) -> Iterator[Session]:
    """A session on the fp32 graph with these matrices quantized, which reads all others in the fp32 graph's file."""
    with _written_probe(fp32, quantizer.alone(quantized, wide), "float32") as session:
        yield session


@contextmanager
def _written_probe(fp32: Fp32Graph, graph: ir.Model, kv: str) -> Iterator[Session]:
    folder = fp32.job.fp32
    ir.save(graph, folder / _PROBE_NAME)
    try:
        with fp32.session(kv, _PROBE_NAME) as session:
            yield session
    finally:
        (folder / _PROBE_NAME).unlink()


def _examples(loaded: Loaded, fp32: Fp32Graph, verdict: Verdict) -> list[dict[str, Any]]:
    """Prompts with both graphs' answers as text, for the report."""
    reference, answered = verdict.reference, verdict.agreement.answers
    assert answered is not None, "there are prompts for every model"
    decode = Tokenizer(fp32.job.bundle / names.TOKENIZER_NAME).decode
    with fp32.bundle_session() as session:
        answers = write_answers(reference, answered.differs_at, session, loaded.judging.stop_ids, _EXAMPLES)
    return [
        {
            "prompt": passage.kind,
            "fp32": decode(passage.token_ids[passage.begin + 1 :]),
            "quantized": decode(answer),
        }
        for passage, answer in zip(reference.answers, answers, strict=False)
    ]


def _measure(loaded: Loaded, fp32: Fp32Graph) -> dict[str, Speed]:
    """Speed of both graphs, for the report."""
    room = max(1, min(_MEASURED_PROMPT, loaded.source.context_length - 1))
    prompt = (loaded.text_ids * (1 + room // len(loaded.text_ids)))[:room]
    speeds: dict[str, Speed] = {}
    for name, opened in (("before", fp32.session), ("after", fp32.bundle_session)):
        with opened() as session:
            speeds[name] = measure_speed(session, prompt, _MEASURED_STEPS)
    return speeds


def _write_for_other_runtimes(loaded: Loaded, fp32: Fp32Graph) -> str | None:
    """Write files for onnxruntime-genai. Returns None, or the reason why there are none."""
    job = fp32.job
    if job.profile.provider != providers.CPU:
        return "its files are written for CPUs: none was tried on a GPU"
    return write_genai_files(job.bundle, fp32.model(fp32.kv), loaded.source.tokens)
