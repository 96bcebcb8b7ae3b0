"""`int4-rowwise`: choose 4, 5, 6 or 8 bits for each matrix, by the size that a bundle may have and the loss of fewer
bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.sessions.protocol import Session
from .codes.nibbles import WIDTHS, load_nibbles, nibble_bytes
from .errors import RecipeError
from .gate.arithmetic import WINDOW_TOKENS
from .gate.weight_bits import LEAST, MOST, Candidate, Step, WeightBits, all_in, choose_bits, steps_of
from .passes.narrow_weights import NarrowWeights, bytes_of_matrices
from .passes.widen_activations import WidenActivations, matrices_of
from .quantization.quantizer import Quantizer
from .quantization.rounding import round_to_nibbles
from .records import Fp32Graph, Loaded, save_graph

_PROBE_NAME = "probe.onnx"
# Bytes of a bundle besides graphs, weights and tokenizer: manifest and reports.
_REPORTS_BYTES = 192 << 10


@dataclass(frozen=True)
class Choosing:
    """The input of choices. The bundle's folder holds the graph with 8 bits everywhere until a choice is written.

    files: every matrix with each number of bits; matrices: their sizes; other_bytes, other_weights_bytes: the rest of
    the bundle, and of its weights.
    """

    loaded: Loaded
    fp32: Fp32Graph
    files: Mapping[int, Mapping[str, Path]]
    matrices: tuple[Candidate, ...]
    other_bytes: int
    other_weights_bytes: int

    @cached_property
    def steps(self) -> list[Step]:
        """The steps from 4 bits to 8, measured with activations of 16 bits. Read it before a choice is written."""
        tokens = min(WINDOW_TOKENS, self.loaded.source.context_length)
        return steps_of(self.matrices, self._probe, self.loaded.calibrating_ids, tokens)

    def size(self, choice: WeightBits) -> int:
        """Bytes of the whole bundle."""
        return self.other_bytes + choice.weights_bytes

    def bits(self, choice: WeightBits) -> float:
        """Bits of the weights for each parameter of the model."""
        return 8 * (self.other_weights_bytes + choice.weights_bytes) / self.fp32.shape.parameters

    def budget(self) -> int | None:
        """Bytes for the matrices within the requested size; None if none was requested."""
        config = self.fp32.job.config
        if config.size is not None:
            return config.size - self.other_bytes
        if config.bits is not None:
            return int(config.bits * self.fp32.shape.parameters / 8) - self.other_weights_bytes
        return None

    def write(self, choice: WeightBits, quantizer: Quantizer) -> Quantizer:
        """Write the bundle's graph and weights with this choice. Returns the quantizer that makes them."""
        narrowed = replace(quantizer, narrow={name: self.files[bits][name] for name, bits in choice.narrow().items()})
        save_graph(narrowed.quantized(), self.fp32.job.bundle)
        return narrowed

    @contextmanager
    def _probe(self, narrow: Collection[str]) -> Iterator[Session]:
        """A session on the bundle's graph in which these matrices have 4 bits, and all others 8."""
        folder = self.fp32.job.bundle
        graph = ir.load(folder / names.GRAPH_NAME)
        wide = list(matrices_of(graph))
        passes = [NarrowWeights({name: self.files[LEAST][name] for name in narrow}), WidenActivations(wide)]
        ir.passes.PassManager(passes)(graph)
        ir.save(graph, folder / _PROBE_NAME)
        try:
            with self.fp32.bundle_session(_PROBE_NAME) as session:
                yield session
        finally:
            (folder / _PROBE_NAME).unlink()


def make_choosing(loaded: Loaded, fp32: Fp32Graph) -> Choosing:
    """Round every matrix to fewer bits, and measure all parts of a bundle. Cost: as of `round_to_nibbles`."""
    job = fp32.job
    limit = (1 << (job.profile.weight_bits - 1)) - 1
    texts = loaded.calibrating_ids if fp32.can_calibrate else []
    widths = WIDTHS if job.config.has_budget else (LEAST,)
    files = round_to_nibbles(fp32.graph, texts, loaded.source.context_length, limit, job.answers, widths=widths)
    matrices = []
    for name, wide in bytes_of_matrices(ir.load(job.bundle / names.GRAPH_NAME)).items():
        rounded = {bits: load_nibbles(files[bits][name]) for bits in widths}
        sizes = {bits: nibble_bytes(*found.shape, bits) for bits, found in rounded.items()}
        matrices.append(Candidate(name, {**sizes, MOST: wide}, {bits: found.error for bits, found in rounded.items()}))
    written = sum(matrix.bytes[MOST] for matrix in matrices)
    graph, weights = ((job.bundle / name).stat().st_size for name in (names.GRAPH_NAME, names.WEIGHTS_NAME))
    # The bundle will have two graphs: one for onnxruntime-genai.
    found = sum(path.stat().st_size for path in job.bundle.iterdir()) + graph + _REPORTS_BYTES
    return Choosing(loaded, fp32, files, tuple(matrices), found - written, weights - written)


def choose_weights(loaded: Loaded, fp32: Fp32Graph, quantizer: Quantizer) -> tuple[WeightBits, Quantizer]:
    """Rewrite the bundle's graph of 8-bit matrices with fewer bits for the chosen ones: without a requested size, 4 for
    all. Raises: RecipeError, if nothing fits."""
    choosing = make_choosing(loaded, fp32)
    choice = _choice(choosing)
    return choice, choosing.write(choice, quantizer)


def _choice(choosing: Choosing) -> WeightBits:
    budget, least, most = choosing.budget(), all_in(choosing.matrices, LEAST), all_in(choosing.matrices, MOST)
    if budget is None:
        return least
    if budget < least.weights_bytes:
        raise _too_small(choosing, least.weights_bytes - budget)
    return most if budget >= most.weights_bytes else choose_bits(choosing.matrices, choosing.steps, budget)


def _too_small(choosing: Choosing, missing: int) -> RecipeError:
    least = choose_bits(choosing.matrices, choosing.steps, 0)
    largest = max(choosing.matrices, key=lambda matrix: matrix.bytes[LEAST])
    return RecipeError(
        f"the smallest bundle of this model takes {choosing.size(least) / 1e6:.2f} MB, {choosing.bits(least):.2f} bits "
        f"a parameter, of which {largest.name} alone takes {largest.bytes[LEAST] / 1e6:.2f} MB, and loses about "
        f"{least.kl:.2g} nats a token: {missing / 1e6:.2f} MB more than was asked for are needed"
    )
