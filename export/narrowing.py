"""The part of `int4-rowwise` that chooses the bits of each matrix: by what a bundle may take, and what 4 bits cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.sessions.protocol import Session
from .errors import RecipeError
from .gate.arithmetic import WINDOW_TOKENS
from .gate.weight_bits import Candidate, Cost, WeightBits, all_in, choose_bits, costs_of
from .passes.narrow_weights import NarrowWeights, bytes_of_matrices
from .passes.widen_activations import WidenActivations, matrices_of
from .quantization.nibbles import load_nibbles, nibble_bytes
from .quantization.rounding import round_to_nibbles
from .quantization.schemes import Quantizer
from .records import Fp32Graph, Loaded, save_graph

_PROBE_NAME = "probe.onnx"
# What a bundle has beside graph, weights and tokenizer: the graph once more for onnxruntime-genai, and the reports.
_REPORTS_BYTES = 192 << 10


@dataclass(frozen=True)
class Narrowing:
    """A model whose bundle's graph is written with 8-bit matrices, and files of every matrix in 4 bits, by name."""

    loaded: Loaded
    fp32: Fp32Graph
    files: Mapping[str, Path]

    def choose(self) -> WeightBits:
        """Bits by what was asked for: 4 everywhere, or what a size or bits a parameter allow. Raises: RecipeError,
        where nothing fits."""
        matrices = self.candidates()
        if not self.fp32.job.config.has_budget:
            return all_in(matrices, 4)
        budget = self._budget(matrices)
        if budget >= sum(matrix.wide_bytes for matrix in matrices):
            return all_in(matrices, 8)
        costs = self.costs(matrices)
        least = sum(matrix.narrow_bytes for matrix in matrices)
        if budget < least:
            raise self._too_small(matrices, costs, least - budget)
        return choose_bits(matrices, costs, budget)

    def write(self, quantizer: Quantizer, chosen: WeightBits) -> Quantizer:
        """Write the bundle's graph and weights with these bits. Returns: the quantizer that did so."""
        narrowed = replace(quantizer, narrow={name: self.files[name] for name in chosen.narrow()})
        save_graph(narrowed.quantized(), self.fp32.job.bundle)
        return narrowed

    def candidates(self) -> list[Candidate]:
        """The matrices of the bundle's graph."""
        found = []
        for name, wide in bytes_of_matrices(ir.load(self._graph)).items():
            nibbles = load_nibbles(self.files[name])
            found.append(Candidate(name, nibble_bytes(*nibbles.shape), wide, nibbles.error))
        return found

    def costs(self, matrices: Sequence[Candidate]) -> list[Cost]:
        """What 4 bits cost each matrix, activations of 16 bits everywhere."""
        tokens = min(WINDOW_TOKENS, self.loaded.source.context_length)
        return costs_of(matrices, self._probe, self.loaded.calibrating_ids, tokens)

    def bundle_bytes(self, matrices: Sequence[Candidate], matrices_bytes: int) -> int:
        """What a bundle takes whose matrices take so many bytes."""
        written = sum(path.stat().st_size for path in self.fp32.job.bundle.iterdir())
        graph = self._graph.stat().st_size
        return written + graph + _REPORTS_BYTES - sum(matrix.wide_bytes for matrix in matrices) + matrices_bytes

    def weights_bytes(self, matrices: Sequence[Candidate], matrices_bytes: int) -> int:
        """The same of the weights alone, norms and tables included."""
        written = (self.fp32.job.bundle / names.WEIGHTS_NAME).stat().st_size
        return written - sum(matrix.wide_bytes for matrix in matrices) + matrices_bytes

    @property
    def _graph(self) -> Path:
        return self.fp32.job.bundle / names.GRAPH_NAME

    @contextmanager
    def _probe(self, narrow: Collection[str]) -> Iterator[Session]:
        """A session on the bundle's graph in which these matrices have 4 bits, and all others 8."""
        graph = ir.load(self._graph)
        files = {name: self.files[name] for name in narrow}
        ir.passes.PassManager([NarrowWeights(files), WidenActivations(list(matrices_of(graph)))])(graph)
        probe = self.fp32.job.bundle / _PROBE_NAME
        ir.save(graph, probe)
        try:
            with self.fp32.bundle_session(_PROBE_NAME) as session:
                yield session
        finally:
            probe.unlink()

    def _budget(self, matrices: Sequence[Candidate]) -> int:
        """Bytes that are left for the matrices of what was asked for."""
        config = self.fp32.job.config
        if config.size is not None:
            return config.size - self.bundle_bytes(matrices, 0)
        assert config.bits is not None, "there is a budget"
        return int(config.bits * self.fp32.shape.parameters / 8) - self.weights_bytes(matrices, 0)

    def _too_small(self, matrices: Sequence[Candidate], costs: Sequence[Cost], missing: int) -> RecipeError:
        least = all_in(matrices, 4)
        size = self.bundle_bytes(matrices, least.weights_bytes)
        bits = 8 * self.weights_bytes(matrices, least.weights_bytes) / self.fp32.shape.parameters
        largest = max(matrices, key=lambda matrix: matrix.narrow_bytes)
        loss = choose_bits(matrices, costs, least.weights_bytes).kl
        return RecipeError(
            f"the smallest bundle of this model takes {size / 1e6:.2f} MB, {bits:.2f} bits a parameter, of which "
            f"{largest.name} alone takes {largest.narrow_bytes / 1e6:.2f} MB, and loses about {loss:.2g} nats a token: "
            f"{missing / 1e6:.2f} MB more than was asked for are needed"
        )


def narrow(loaded: Loaded, fp32: Fp32Graph) -> Narrowing:
    """Round every matrix of the fp32 graph to 4 bits, in files of the export's scratch folder."""
    job = fp32.job
    texts = loaded.calibrating_ids if fp32.can_calibrate else []
    limit = (1 << (job.profile.weight_bits - 1)) - 1
    files = round_to_nibbles(fp32.graph, texts, loaded.source.context_length, limit, job.answers)
    return Narrowing(loaded, fp32, files)
