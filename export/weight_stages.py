"""The stages of `int4-rowwise` that choose the bits of each matrix: by what a bundle may take, and what 4 bits cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.sessions.protocol import Session
from .context import Context, save_graph
from .errors import RecipeError
from .gate.arithmetic import WINDOW_TOKENS
from .gate.weight_bits import Candidate, Cost, WeightBits, all_in, choose_bits, costs_of
from .passes.narrow_weights import NarrowWeights, bytes_of_matrices
from .passes.widen_activations import WidenActivations, matrices_of
from .quantization.nibbles import load_nibbles, nibble_bytes
from .quantization.rounding import round_to_nibbles
from .tracing.ways import FUSED

_PROBE_NAME = "probe.onnx"
# What a bundle has beside graph, weights and tokenizer: the graph once more for onnxruntime-genai, and the reports.
_REPORTS_BYTES = 192 << 10


def narrow_files(context: Context) -> Mapping[str, Path]:
    """Every matrix of the fp32 graph in 4 bits."""
    limit = (1 << (context.profile.weight_bits - 1)) - 1
    texts = context.calibrating_ids if can_calibrate(context) else []
    graph = context.reference / names.GRAPH_NAME
    return round_to_nibbles(graph, texts, context.source.context_length, limit, context.answers)


def can_calibrate(context: Context) -> bool:
    """Whether the inputs of matrices can be computed: the other ways to trace give graphs with inputs of their own."""
    return context.path == FUSED and not context.shape.states


def choose_weights(context: Context) -> None:
    """Rewrite the bundle's graph, of 8-bit matrices, with 4 bits for those that are chosen. Raises: RecipeError, where
    nothing fits."""
    files = context.narrow_files
    matrices = candidates(context)
    if not context.config.has_budget:
        chosen = all_in(matrices, 4)
    else:
        budget = matrices_budget(context, matrices)
        least = sum(matrix.narrow_bytes for matrix in matrices)
        if budget < least or budget < sum(matrix.wide_bytes for matrix in matrices):
            costs = measure_costs(context, matrices)
            if budget < least:
                raise _too_small(context, matrices, costs, least - budget)
            chosen = choose_bits(matrices, costs, budget)
        else:
            chosen = all_in(matrices, 8)
    use_weights(context, chosen, files)


def use_weights(context: Context, chosen: WeightBits, files: Mapping[str, Path]) -> None:
    """Write the bundle's graph and weights with these bits."""
    context.weight_bits = chosen
    context.quantizer = replace(context.quantizer, narrow={name: files[name] for name in chosen.narrow()})
    save_graph(context.quantizer.quantized(), context.result)


def candidates(context: Context) -> list[Candidate]:
    """The matrices of the bundle's graph, which has 8 bits everywhere."""
    found = []
    for name, wide in bytes_of_matrices(ir.load(context.result / names.GRAPH_NAME)).items():
        nibbles = load_nibbles(context.narrow_files[name])
        found.append(Candidate(name, nibble_bytes(*nibbles.shape), wide, nibbles.error))
    return found


def measure_costs(context: Context, matrices: Sequence[Candidate]) -> list[Cost]:
    """What 4 bits cost each matrix, activations of 16 bits everywhere."""
    tokens = min(WINDOW_TOKENS, context.source.context_length)
    return costs_of(matrices, partial(_probe, context), context.calibrating_ids, tokens)


@contextmanager
def _probe(context: Context, narrow: Collection[str]) -> Iterator[Session]:
    """A session on the bundle's graph in which these matrices have 4 bits, and all others 8."""
    graph = ir.load(context.result / names.GRAPH_NAME)
    wide = list(matrices_of(graph))
    files = {name: context.narrow_files[name] for name in narrow}
    ir.passes.PassManager([NarrowWeights(files), WidenActivations(wide)])(graph)
    ir.save(graph, context.result / _PROBE_NAME)
    try:
        with context.session(context.result, context.kv, _PROBE_NAME) as session:
            yield session
    finally:
        (context.result / _PROBE_NAME).unlink()


def bundle_bytes(context: Context, matrices: Sequence[Candidate], matrices_bytes: int) -> int:
    """What a bundle takes whose matrices take so many bytes, by the one of 8-bit matrices that is written now."""
    written = sum(path.stat().st_size for path in context.result.iterdir())
    graph = (context.result / names.GRAPH_NAME).stat().st_size
    return written + graph + _REPORTS_BYTES - sum(matrix.wide_bytes for matrix in matrices) + matrices_bytes


def weights_bytes(context: Context, matrices: Sequence[Candidate], matrices_bytes: int) -> int:
    """The same of the weights alone, norms and tables included."""
    written = (context.result / names.WEIGHTS_NAME).stat().st_size
    return written - sum(matrix.wide_bytes for matrix in matrices) + matrices_bytes


def matrices_budget(context: Context, matrices: Sequence[Candidate]) -> int:
    """Bytes that are left for the matrices of what was asked for."""
    config = context.config
    if config.size is not None:
        return config.size - bundle_bytes(context, matrices, 0)
    assert config.bits is not None, "there is a budget"
    return int(config.bits * context.shape.parameters / 8) - weights_bytes(context, matrices, 0)


def _too_small(context: Context, matrices: Sequence[Candidate], costs: Sequence[Cost], missing: int) -> RecipeError:
    least = all_in(matrices, 4)
    size = bundle_bytes(context, matrices, least.weights_bytes)
    bits = 8 * weights_bytes(context, matrices, least.weights_bytes) / context.shape.parameters
    largest = max(matrices, key=lambda matrix: matrix.narrow_bytes)
    loss = choose_bits(matrices, costs, least.weights_bytes).kl
    return RecipeError(
        f"the smallest bundle of this model takes {size / 1e6:.2f} MB, {bits:.2f} bits a parameter, of which "
        f"{largest.name} alone takes {largest.narrow_bytes / 1e6:.2f} MB, and loses about {loss:.2g} nats a token: "
        f"{missing / 1e6:.2f} MB more than was asked for are needed"
    )
