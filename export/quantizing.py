"""The stages from the fp32 graph to the one that ships: calibrate, quantize, judge, measure, other runtimes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..runtime import bundle as names
from ..runtime import providers
from ..runtime.measure import measure_speed
from ..runtime.scoring import DEFAULT_WINDOW
from ..runtime.session import Session
from . import verify
from .blocks import BlockQuantizer, BlockSettings
from .cache_gate import calibrate_cache
from .cache_prompts import cache_prompts
from .calibrate import Ranges
from .genai import write_genai_files
from .hessians import make_block_quantizer
from .quantize import Quantizer
from .repair import Candidate, judge

if TYPE_CHECKING:
    pass
from .context import Context, save_graph

_MEASURED_PROMPT = 128
# Decode steps on top of each run of the prompt. `edgelm bench` measures longer; these figures are for the report.
_MEASURED_STEPS = 8
_PROBE_NAME = "probe.onnx"


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
    context.quantizer = Quantizer(
        context.reference / names.GRAPH_NAME,
        context.scheme,
        context.profile.weight_bits,
        context.ranges,
        context.profile.activations,
        None if context.blocks is None else _block_quantizer(context, context.blocks),
    )
    _write_quantized(context, ())


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
    with _written_probe(context, context.quantizer.alone(quantized), "float32") as session:
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
