"""The stages from the fp32 graph to the one that ships: calibrate, quantize, choose arithmetic, judge, measure, other
runtimes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.evaluation.speed import measure_speed
from ..runtime.sessions import providers
from ..runtime.sessions.protocol import Session
from ..runtime.text.tokenizer import Tokenizer
from ..targets import Gate
from ..targets.abilities import MIXED_SCHEME
from .gate.arithmetic import WINDOW_TOKENS, Arithmetic, choose_activations, wide_everywhere
from .gate.cache_judge import calibrate_cache
from .gate.cache_prompts import cache_prompts
from .gate.quality import QuantizedAgreement
from .gate.reference import Reference, write_answers
from .gate.repair import Attempt, Candidate, judge
from .output.genai import write_genai_files
from .passes.quantize_linears import ROWWISE_SCHEMES
from .passes.widen_activations import WidenActivations, matrices_of
from .quantization.blocks import BlockQuantizer, BlockSettings
from .quantization.calibration import Ranges
from .quantization.hessians import make_block_quantizer
from .quantization.rounding import round_matrices
from .quantization.schemes import Quantizer
from .weight_stages import can_calibrate, choose_weights, narrow_files

if TYPE_CHECKING:
    pass
from .context import Context, save_graph

_MEASURED_PROMPT = 128
# Decode steps on top of each run of the prompt. `edgelm bench` measures longer; these figures are for the report.
_MEASURED_STEPS = 8
_PROBE_NAME = "probe.onnx"
_EXAMPLES = 8


def calibrate(context: Context) -> None:
    """The scales of an INT8 cache, judged on what did not calibrate them. Raises: VerificationError."""
    if context.kv == "int8":
        source = context.source
        prompts = cache_prompts(context.text_ids, context.unusual, source.vocab_size, source.context_length)
        reference = partial(context.session, context.reference, "float32")
        context.ranges, context.cache_agreement = calibrate_cache(
            reference, partial(_cache_probe, context), prompts, context.profile.gate, context.answers
        )


@contextmanager
def _cache_probe(context: Context, ranges: Ranges) -> Iterator[Session]:
    """A session on the fp32 graph with an INT8 cache, which reads the weights in the fp32 graph's file."""
    graph = Quantizer(context.reference / names.GRAPH_NAME, "fp32", context.profile.weight_bits, ranges).quantized()
    with _written_probe(context, graph, "int8") as session:
        yield session


def quantize(context: Context) -> None:
    """Write the bundle's graph and weights, all matrices quantized."""
    rounded: Mapping[str, Path] = {}
    # Where none is kept in 8 bits, nearest values serve until all are replaced.
    if context.scheme == MIXED_SCHEME:
        context.narrow_files = narrow_files(context)
    kept = context.scheme != MIXED_SCHEME or context.config.has_budget
    if context.scheme in ROWWISE_SCHEMES and kept and can_calibrate(context):
        graph, limit = context.reference / names.GRAPH_NAME, (1 << (context.profile.weight_bits - 1)) - 1
        texts, length = context.calibrating_ids, context.source.context_length
        rounded = round_matrices(graph, texts, length, limit, context.answers)
    context.quantizer = Quantizer(
        context.reference / names.GRAPH_NAME,
        context.scheme,
        context.profile.weight_bits,
        context.ranges,
        context.profile.activations,
        None if context.blocks is None else _block_quantizer(context, context.blocks),
        rounded,
    )
    _write_quantized(context, ())


def choose_arithmetic(context: Context) -> None:
    """8 or 16 bits for the activations of each matrix in the row-wise schemes, behind 4 or 8 for its weights in
    int4-rowwise. A model that is fed token by token has 16 everywhere: there is no long step in which 8 would save
    time."""
    if context.scheme not in ROWWISE_SCHEMES:
        return
    if context.scheme == MIXED_SCHEME:
        choose_weights(context)
    matrices = matrices_of(ir.load(context.result / names.GRAPH_NAME))
    if context.shape.step_tokens is not None:
        context.arithmetic = wide_everywhere(matrices)
        return
    probe = partial(_arithmetic_probe, context, frozenset(matrices))
    budget = context.profile.gate.activations_kl
    tokens = min(WINDOW_TOKENS, context.source.context_length)
    context.arithmetic = choose_activations(matrices, probe, context.calibrating_ids, budget, tokens)


def _attempts(context: Context) -> list[Attempt]:
    """The chosen arithmetic, then 16 bits everywhere; for other schemes the one graph that is written."""
    chosen = context.arithmetic
    if chosen is None:
        return [Attempt("with all matrices quantized", lambda: None)]
    everywhere = Attempt(
        "with activations of 16 bits everywhere",
        partial(use_arithmetic, context, wide_everywhere(dict.fromkeys(chosen.activations, 0))),
    )
    if set(chosen.activations.values()) == {16}:
        return [everywhere]
    return [Attempt("with activations of 8 and 16 bits", partial(use_arithmetic, context, chosen)), everywhere]


def use_arithmetic(context: Context, arithmetic: Arithmetic) -> None:
    """Let the bundle's graph compute so. The weights stay as they are."""
    ir.save(_with_wide(context, arithmetic.wide()), context.result / names.GRAPH_NAME)
    context.arithmetic = arithmetic


def _with_wide(context: Context, wide: Collection[str]) -> ir.Model:
    """The bundle's graph, over the weights that are written, with activations of 16 bits for these matrices alone."""
    graph = ir.load(context.result / names.GRAPH_NAME)
    ir.passes.PassManager([WidenActivations(wide)])(graph)
    return graph


@contextmanager
def _arithmetic_probe(context: Context, matrices: frozenset[str], narrow: Collection[str]) -> Iterator[Session]:
    """A session on the bundle's graph in which these matrices have activations of 8 bits, and all others of 16."""
    ir.save(_with_wide(context, matrices.difference(narrow)), context.result / _PROBE_NAME)
    try:
        with context.session(context.result, context.kv, _PROBE_NAME) as session:
            yield session
    finally:
        (context.result / _PROBE_NAME).unlink()


def _block_quantizer(context: Context, settings: BlockSettings) -> BlockQuantizer:
    """The quantizer of a model that was compressed with `weights-int4`, with what its method needs."""
    graph = context.reference / names.GRAPH_NAME
    return make_block_quantizer(settings, graph, context.text_ids, context.source.context_length)


def _write_quantized(context: Context, excluded: Collection[str]) -> None:
    """The bundle's graph and weights, with the matrices of these names left in float32."""
    save_graph(context.quantizer.quantized(excluded), context.result)


@contextmanager
def _probe(context: Context, quantized: Collection[str]) -> Iterator[Session]:
    """A session on the fp32 graph with these matrices quantized, which reads all others in the fp32 graph's file."""
    wide = () if context.arithmetic is None else context.arithmetic.wide()
    with _written_probe(context, context.quantizer.alone(quantized, wide), "float32") as session:
        yield session


@contextmanager
def _written_probe(context: Context, graph: ir.Model, kv: str) -> Iterator[Session]:
    ir.save(graph, context.reference / _PROBE_NAME)
    try:
        with context.session(context.reference, kv, _PROBE_NAME) as session:
            yield session
    finally:
        (context.reference / _PROBE_NAME).unlink()


def judge_quantized(context: Context) -> None:
    """The gate: the quantized graph against the fp32 one, repaired where it can be. Raises: VerificationError."""
    if context.scheme == "fp32" and context.kv == "float32":
        return
    gate = _gate(context)
    candidate = Candidate(
        reference=partial(context.session, context.reference, "float32"),
        reference_bytes=(context.reference / names.WEIGHTS_NAME).stat().st_size,
        quantized=partial(context.session, context.result, context.kv),
        attempts=_attempts(context),
        leave_out=None if context.scheme in ROWWISE_SCHEMES else partial(_write_quantized, context),
        remedy=_remedy(context),
        probe=partial(_probe, context),
        matrices=context.quantizer.matrices,
    )
    verdict = judge(candidate, context.judging, context.source.context_length, gate, context.answers)
    context.quantized_agreement = verdict.agreement
    context.sensitivity, context.excluded = verdict.sensitivity, verdict.excluded
    context.examples = _examples(context, verdict.reference, verdict.agreement)


def _gate(context: Context) -> Gate:
    """The target's limits for the scheme, or those of the loss that the user allows."""
    gate = context.profile.gate_of(context.scheme)
    return gate if context.config.max_kl is None else gate.allowing(context.config.max_kl)


def _remedy(context: Context) -> str:
    return "--kv float32, --scheme int8-weight or --scheme fp32" if context.kv == "int8" else "--scheme fp32"


def _examples(context: Context, reference: Reference, agreement: QuantizedAgreement) -> list[dict[str, Any]]:
    """Prompts with both answers as text, for the report."""
    assert agreement.answers is not None, "there are prompts for every model"
    decode = Tokenizer(context.result / names.TOKENIZER_NAME).decode
    with context.session(context.result, context.kv) as session:
        answers = write_answers(reference, agreement.answers.differs_at, session, context.judging.stop_ids, _EXAMPLES)
    return [
        {
            "prompt": passage.kind,
            "fp32": decode(passage.token_ids[passage.begin + 1 :]),
            "quantized": decode(answer),
        }
        for passage, answer in zip(reference.answers, answers, strict=False)
    ]


def measure(context: Context) -> None:
    """Speed of both graphs, for the report."""
    room = max(1, min(_MEASURED_PROMPT, context.source.context_length - 1))
    prompt = (context.text_ids * (1 + room // len(context.text_ids)))[:room]
    for name, folder, kv in (("before", context.reference, "float32"), ("after", context.result, context.kv)):
        with context.session(folder, kv) as session:
            context.speeds[name] = measure_speed(session, prompt, _MEASURED_STEPS)


def write_for_other_runtimes(context: Context) -> None:
    """Files for onnxruntime-genai, or the reason why there are none."""
    if context.profile.provider != providers.CPU:
        context.without_genai = "its files are written for CPUs: none was tried on a GPU"
        return
    context.without_genai = write_genai_files(context.result, context.model(context.kv), context.source.tokens)
