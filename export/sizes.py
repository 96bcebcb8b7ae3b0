"""What a model would lose at several sizes, measured without a bundle being written: for `edgelm export --sizes`.

The model is loaded, traced and quantized as by an export; then graphs of several sizes between 4 and 8 bits are made
one after another in the scratch folder, held against the fp32 graph as the gate does, and timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.evaluation.speed import measure_speed
from ..targets.abilities import MIXED_SCHEME
from . import libraries
from .config import ExportConfig
from .context import Context
from .errors import RecipeError
from .gate.arithmetic import wide_everywhere
from .gate.quality import measure as hold
from .gate.reference import Reference, observe
from .gate.weight_bits import WeightBits, choose_bits
from .output import place
from .passes.widen_activations import matrices_of
from .pipeline import default_output, provider_of
from .quantizing_stages import calibrate, quantize, use_arithmetic
from .source.loading import find_source
from .stages import Progress, run_stages
from .tracing_stages import compare_with_torch, fuse, load, trace
from .weight_stages import bundle_bytes, candidates, measure_costs, use_weights, weights_bytes

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
    with place.partial_folder(out) as work:
        context = Context(config, profile, scheme, folder, out, work, provider_of(profile))
        stages = [("load", load), ("trace", trace), ("fuse", fuse), ("compare with torch", compare_with_torch)]
        points: list[SizePoint] = []

        def measure(context: Context) -> None:
            points.extend(_points(context))

        run_stages(
            context,
            [
                *stages,
                ("calibrate", calibrate),
                ("quantize", quantize),
                ("measure", measure),
            ],
            f"{config.model} for {profile.name}",
            progress,
        )
    return points


def _points(context: Context) -> list[SizePoint]:
    matrices = candidates(context)
    costs = measure_costs(context, matrices)
    least, most = (sum(getattr(item, name) for item in matrices) for name in ("narrow_bytes", "wide_bytes"))
    choices = [choose_bits(matrices, costs, least + (most - least) * step // (POINTS - 1)) for step in range(POINTS)]
    sizes = [
        (bundle_bytes(context, matrices, choice.weights_bytes), weights_bytes(context, matrices, choice.weights_bytes))
        for choice in choices
    ]
    with context.session(context.reference, "float32") as session:
        reference = observe(session, context.judging, context.source.context_length, context.answers)
    return [
        _point(context, reference, choice, size, weights)
        for choice, (size, weights) in zip(choices, sizes, strict=True)
    ]


def _point(context: Context, reference: Reference, choice: WeightBits, size: int, weights: int) -> SizePoint:
    context.quantizer = replace(context.quantizer, narrow={})
    use_weights(context, choice, context.narrow_files)
    use_arithmetic(context, wide_everywhere(matrices_of(ir.load(context.result / names.GRAPH_NAME))))
    prompt = (context.text_ids * _PROMPT)[: min(_PROMPT, context.source.context_length - 1)]
    with context.session(context.result, context.kv) as session:
        agreement = hold(reference, session, context.profile.gate)
        speed = measure_speed(session, prompt, _STEPS)
    return SizePoint(
        bytes=size,
        bits=8 * weights / context.shape.parameters,
        mean_kl=agreement.mean_kl,
        perplexity_increase_percent=agreement.perplexity_increase_percent,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        narrow=len(choice.narrow()),
        matrices=len(choice.bits),
    )
