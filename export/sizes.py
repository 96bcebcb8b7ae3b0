"""What a model would lose at several sizes, measured without a bundle being written: for `edgelm export --sizes`.

The model is loaded, traced and quantized as by an export; then graphs of several sizes between 4 and 8 bits are made
one after another in the scratch folder, held against the fp32 graph as the gate does, and timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.evaluation.speed import Speed, measure_speed
from ..targets.abilities import MIXED_SCHEME
from . import libraries
from .config import ExportConfig
from .errors import RecipeError
from .fp32_graph import load, make_fp32_graph
from .gate.arithmetic import wide_everywhere
from .gate.quality import QuantizedAgreement
from .gate.quality import measure as hold
from .gate.reference import Reference, observe
from .gate.weight_bits import choose_bits
from .narrowing import Narrowing, narrow
from .output import place
from .passes.widen_activations import matrices_of
from .pipeline import default_output, provider_of
from .quantization.schemes import Quantizer
from .quantized_graph import calibrate, quantize, use_arithmetic
from .records import Job
from .source.finding import find_source
from .stages import Progress, Stages

POINTS = 7
_PROMPT, _STEPS = 128, 8


@dataclass(frozen=True)
class SizePoint:
    """One size. bytes: of the whole bundle; bits: of the weights for each parameter; mean_kl: nats a token from fp32;
    perplexity_increase_percent: on the same text; decode_tokens_per_s: on this machine, 128 tokens of context."""

    bytes: int
    bits: float
    mean_kl: float
    perplexity_increase_percent: float
    decode_tokens_per_s: float
    narrow: int
    matrices: int


def measure_sizes(config: ExportConfig, progress: Progress | None = None) -> list[SizePoint]:
    """The points, smallest first. Activations have 16 bits everywhere, so that the weights alone are compared.

    Raises: as `export_model`. Cost: that of an export, and a run of the judging texts for each point.
    """
    if config.has_budget:
        raise RecipeError("the sizes that a model can have are shown for no size or bits: leave these out")
    libraries.redirect()
    profile = config.profile()
    config = replace(config, scheme=MIXED_SCHEME, bits=9.0)  # any budget: so the 8-bit matrices are rounded well
    scheme = config.quantization(profile)
    folder = find_source(config.model, config.revision)
    out = config.out or default_output(config.model, folder, profile.name)
    stages = Stages(f"{config.model} for {profile.name}", progress)
    with place.partial_folder(out) as work:
        job = Job(config, profile, folder, work, provider_of(profile))
        with stages.stage("load"):
            loaded, module = load(job, scheme)
        fp32 = make_fp32_graph(job, loaded, module, stages)
        with stages.stage("calibrate"):
            ranges, _ = calibrate(loaded, fp32)
        with stages.stage("quantize"):
            quantizer = quantize(loaded, fp32, ranges)
            narrowing = narrow(loaded, fp32)
        with stages.stage("measure"):
            return _points(narrowing, quantizer)


def _points(narrowing: Narrowing, quantizer: Quantizer) -> list[SizePoint]:
    matrices = narrowing.candidates()
    costs = narrowing.costs(matrices)
    least, most = (sum(getattr(item, name) for item in matrices) for name in ("narrow_bytes", "wide_bytes"))
    choices = [choose_bits(matrices, costs, least + (most - least) * step // (POINTS - 1)) for step in range(POINTS)]
    # By the bundle of 8 bits that is written now, and no more behind the first point.
    sizes = [
        (narrowing.bundle_bytes(matrices, taken), narrowing.weights_bytes(matrices, taken))
        for taken in (choice.weights_bytes for choice in choices)
    ]
    fp32, loaded = narrowing.fp32, narrowing.loaded
    with fp32.session() as session:
        reference = observe(session, loaded.judging, loaded.source.context_length, fp32.job.answers)
    points = []
    for choice, (size, weights) in zip(choices, sizes, strict=True):
        narrowing.write(quantizer, choice)
        use_arithmetic(fp32, wide_everywhere(matrices_of(ir.load(fp32.job.bundle / names.GRAPH_NAME))))
        agreement, speed = _measured(narrowing, reference)
        points.append(
            SizePoint(
                bytes=size,
                bits=8 * weights / fp32.shape.parameters,
                mean_kl=agreement.mean_kl,
                perplexity_increase_percent=agreement.perplexity_increase_percent,
                decode_tokens_per_s=speed.decode_tokens_per_s,
                narrow=len(choice.narrow()),
                matrices=len(choice.bits),
            )
        )
    return points


def _measured(narrowing: Narrowing, reference: Reference) -> tuple[QuantizedAgreement, Speed]:
    """Loss and speed of the bundle's graph as it is written now."""
    fp32, loaded = narrowing.fp32, narrowing.loaded
    prompt = (loaded.text_ids * _PROMPT)[: min(_PROMPT, loaded.source.context_length - 1)]
    with fp32.bundle_session() as session:
        return hold(reference, session, fp32.job.profile.gate), measure_speed(session, prompt, _STEPS)
