"""The records that the stages of an export pass on: a job, and one record for each of its three parts.

Job -> Loaded (source and texts) -> Fp32Graph (traced, fused, equal to torch) -> QuantizedGraph (what ships)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import CacheType, Model
from ..runtime.evaluation.speed import Speed
from ..runtime.host import machine
from ..runtime.sessions import providers
from ..runtime.sessions.loading import make_session
from ..runtime.sessions.protocol import Session
from ..targets import Profile
from .codes.blocks import BlockSettings
from .config import ExportConfig
from .gate.arithmetic import Arithmetic
from .gate.cache_judge import CacheAgreement
from .gate.cache_prompts import UnusualTokens
from .gate.judging import Judging
from .gate.repair import Verdict
from .gate.verify import SourceAgreement
from .gate.weight_bits import WeightBits
from .source.loading import SourceModel
from .tracing.ways import FUSED


@dataclass(frozen=True)
class Job:
    """What is exported, for which target, and the scratch folders.

    folder: of the model, or its GGUF file; work: scratch folder, deleted when the export ends; provider: where the
    quantized graph runs here, the target's provider or the CPU's.
    """

    config: ExportConfig
    profile: Profile
    folder: Path
    work: Path
    provider: str

    @property
    def bundle(self) -> Path:
        """The folder that becomes the bundle."""
        return self.work / "bundle"

    @property
    def fp32(self) -> Path:
        """The scratch folder of the fp32 graph."""
        return self.work / "fp32"

    @property
    def answers(self) -> Path:
        """The scratch folder of answers to compare with."""
        return self.work / "answers"

    @property
    def not_run(self) -> tuple[str, ...]:
        """What could not be tried on this machine, in words."""
        wanted = self.profile.provider
        if self.provider == wanted:
            return ()
        return (
            f"nothing ran on {wanted}, which is not here: the graph was judged, and its speed measured, on "
            f"{self.provider}",
        )


@dataclass(frozen=True)
class Loaded:
    """The source's description and texts, without its weights, which are freed when torch has answered.

    scheme: of the quantized graph; blocks: how to store the weights of a model compressed with weights-int4; text_ids:
    the calibrating text; calibrating_ids: that text and edgelm's own; judging: other texts.
    """

    source: SourceModel
    scheme: str
    blocks: BlockSettings | None
    text_ids: list[int]
    calibrating_ids: list[list[int]]
    judging: Judging
    unusual: UnusualTokens


@dataclass(frozen=True)
class Fp32Graph:
    """The fp32 graph in its scratch folder, which answers as torch does.

    path: the way it was traced; refusals: why better ways failed; shape: the model with a float32 cache; kv: the type
    of the bundle's cache; granularity: of the scales of an INT8 cache.
    """

    job: Job
    path: str
    refusals: tuple[str, ...]
    shape: Model
    kv: str
    granularity: str
    agreement: SourceAgreement

    @property
    def graph(self) -> Path:
        """The graph's file."""
        return self.job.fp32 / names.GRAPH_NAME

    @property
    def can_calibrate(self) -> bool:
        """Whether the inputs of matrices can be computed: graphs that were traced in other ways have other inputs."""
        return self.path == FUSED and not self.shape.states

    def model(self, kv: str) -> Model:
        """The manifest's description of the model, with a cache of this type."""
        return replace(self.shape, kv=CacheType(kv, self.granularity if kv == "int8" else None))

    def session(self, kv: str = "float32", graph: str = names.GRAPH_NAME) -> AbstractContextManager[Session]:
        """A session of the shipping runtime on the CPU, over the fp32 graph or a trial variant of it. An INT8 cache has
        only fixed scales, which are coarser."""
        return open_session(self.job.fp32 / graph, replace(self.shape, kv=CacheType(kv, None)), providers.CPU)

    def bundle_session(self, graph: str = names.GRAPH_NAME) -> AbstractContextManager[Session]:
        """A session of the shipping runtime over the quantized graph, on the target's provider if it is here."""
        return open_session(self.job.bundle / graph, self.model(self.kv), self.job.provider)


@dataclass(frozen=True)
class QuantizedGraph:
    """The graph in the bundle's folder, which is within the target's limits.

    cache: None for a float32 cache; weights, arithmetic: None for schemes without such a choice; verdict: None if the
    graph is the fp32 one; examples: prompts with both answers; speeds: of "before" and "after"; without_genai: why
    onnxruntime-genai's files are missing.
    """

    cache: CacheAgreement | None
    weights: WeightBits | None
    arithmetic: Arithmetic | None
    verdict: Verdict | None
    examples: list[dict[str, Any]]
    speeds: dict[str, Speed]
    without_genai: str | None


@contextmanager
def open_session(graph: Path, model: Model, provider: str) -> Iterator[Session]:
    """A session with the default number of threads, closed at the end of the block."""
    session = make_session(graph, model, machine.default_threads(), [provider])
    try:
        yield session
    finally:
        session.close()


def save_graph(graph: ir.Model, folder: Path) -> None:
    """Write graph and weights. Weights are computed one at a time, as they are written. torch's metadata of nodes are
    removed: stack traces with paths of this machine."""
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    ir.save(graph, folder / names.GRAPH_NAME, external_data=names.WEIGHTS_NAME)
