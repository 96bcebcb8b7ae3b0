"""Measure the loss of a model at several sizes, without writing a bundle: for `edgelm export --sizes`.

The model is loaded, traced and quantized as in an export. Then graphs of several sizes between 4 and 8 bits are written
one after another to the scratch folder, compared with the fp32 graph as in the gate, and timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.evaluation.speed import measure_speed
from ..targets.abilities import MIXED_SCHEME
from . import libraries
from .config import ExportConfig
from .errors import RecipeError
from .fp32_graph import load, make_fp32_graph
from .gate.quality import measure
from .gate.reference import Reference, observe
from .gate.weight_bits import WeightBits, all_in, choose_bits
from .output import place
from .passes.widen_activations import WidenActivations, matrices_of
from .pipeline import default_output, provider_of
from .quantization.quantizer import Quantizer
from .quantized_graph import calibrate, make_quantizer
from .records import Job, save_graph
from .source.finding import find_source
from .stages import Progress, Stages
from .weight_choice import Choosing, make_choosing

POINTS = 7
_PROMPT, _STEPS = 128, 8
# Any budget: if there is one, matrices of 8 bits are rounded as well as possible.
_ALL_BITS = 16.0


@dataclass(frozen=True)
class SizePoint:
    """One size. bytes: of the whole bundle; bits: of the weights, for each parameter; mean_kl: KL divergence from fp32
    in nats a token; perplexity_increase_percent: on the same texts; decode_tokens_per_s: on this machine, with 128
    tokens of context; narrow: number of matrices with 4 bits, out of `matrices`."""

    bytes: int
    bits: float
    mean_kl: float
    perplexity_increase_percent: float
    decode_tokens_per_s: float
    narrow: int
    matrices: int


def measure_sizes(config: ExportConfig, progress: Progress | None = None) -> list[SizePoint]:
    """The points, smallest first. Activations have 16 bits everywhere, so that only the weights differ.

    Raises: as `export_model`. Cost: that of an export, and a run of the judging texts for each point.
    """
    if config.has_budget or config.scheme not in (None, MIXED_SCHEME) or config.compress is not None:
        raise RecipeError("all sizes are shown of one model in one scheme: leave size, bits, scheme and recipe out")
    libraries.redirect()
    profile = config.profile()
    provider = provider_of(profile)
    config = replace(config, bits=_ALL_BITS)
    scheme = config.quantization(profile)
    folder = find_source(config.model, config.revision)
    out = config.out or default_output(config.model, folder, profile.name)
    stages = Stages(f"{config.model} for {profile.name}", progress)
    with place.partial_folder(out) as work:
        job = Job(config, profile, folder, work, provider)
        with stages.stage("load"):
            loaded, module = load(job, scheme)
        fp32 = make_fp32_graph(job, loaded, module, stages)
        with stages.stage("calibrate"):
            ranges, _ = calibrate(loaded, fp32)
        with stages.stage("quantize"):
            quantizer = make_quantizer(loaded, fp32, ranges)
            save_graph(quantizer.quantized(), job.bundle)
            choosing = make_choosing(loaded, fp32)
        with stages.stage("choose weights"):
            choices = _choices(choosing)
        with stages.stage("measure"), fp32.session() as session:
            reference = observe(session, loaded.judging, loaded.source.context_length, job.answers)
            return [_point(choosing, quantizer, reference, choice) for choice in choices]


def _choices(choosing: Choosing) -> list[WeightBits]:
    """Choices from 4 bits everywhere to 8, in equal steps of bytes."""
    least, most = (all_in(choosing.matrices, bits).weights_bytes for bits in (4, 8))
    budgets = [least + (most - least) * step // (POINTS - 1) for step in range(POINTS)]
    return [choose_bits(choosing.matrices, choosing.steps, budget) for budget in budgets]


def _point(choosing: Choosing, quantizer: Quantizer, reference: Reference, choice: WeightBits) -> SizePoint:
    fp32, loaded = choosing.fp32, choosing.loaded
    choosing.write(choice, quantizer)
    path = fp32.job.bundle / names.GRAPH_NAME
    graph = ir.load(path)
    WidenActivations(list(matrices_of(graph)))(graph)
    ir.save(graph, path)
    prompt = (loaded.text_ids * _PROMPT)[: min(_PROMPT, loaded.source.context_length - 1)]
    with fp32.bundle_session() as session:
        agreement = measure(reference, session, fp32.job.profile.gate)
        speed = measure_speed(session, prompt, _STEPS)
    return SizePoint(
        bytes=choosing.size(choice),
        bits=choosing.bits(choice),
        mean_kl=agreement.mean_kl,
        perplexity_increase_percent=agreement.perplexity_increase_percent,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        narrow=len(choice.narrow()),
        matrices=len(choice.bits),
    )
