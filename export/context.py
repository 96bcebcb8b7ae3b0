"""What the stages of an export hand on to each other, and where they keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import CacheType, Exclusion, Model
from ..runtime.evaluation.speed import Speed
from ..runtime.host import machine
from ..runtime.sessions import providers
from ..runtime.sessions.loading import make_session
from ..runtime.sessions.protocol import Session
from ..targets import Profile
from .config import ExportConfig
from .gate import verify
from .gate.arithmetic import Arithmetic
from .gate.cache_judge import CacheAgreement
from .gate.cache_prompts import UnusualTokens
from .gate.judging import Judging
from .gate.quality import QuantizedAgreement
from .gate.sensitivity import Sensitivity
from .gate.weight_bits import WeightBits
from .quantization.blocks import BlockSettings
from .quantization.calibration import Ranges
from .quantization.schemes import Quantizer
from .source.loading import SourceModel
from .tracing.ways import PATHS, TracePath

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Context:
    """What the stages hand on. Fields without a default are set by the stage that is named beside them."""

    config: ExportConfig
    profile: Profile
    scheme: str
    folder: Path
    out: Path
    work: Path
    provider: str  # what the quantized graph runs on here: the target's provider, or the CPU's
    source: SourceModel = field(init=False)  # load
    module: PreTrainedModel | None = None  # load, until torch has answered
    text_ids: list[int] = field(init=False)  # load
    calibrating_ids: list[list[int]] = field(init=False)  # load
    judging: Judging = field(init=False)  # load
    unusual: UnusualTokens = field(init=False)  # load
    blocks: BlockSettings | None = None  # load: how a compressed model's weights are to be stored
    kv: str = field(init=False)  # trace
    paths: Iterator[TracePath] = field(default_factory=lambda: iter(PATHS))
    path: str = field(init=False)  # trace
    refusals: list[str] = field(default_factory=list)  # trace, compare with torch
    shape: Model = field(init=False)  # trace
    graph: ir.Model | None = None  # trace, until it is written
    granularity: str = "channel"  # fuse: of the scales of an INT8 cache
    ranges: Ranges = field(default_factory=dict)  # calibrate
    cache_agreement: CacheAgreement | None = None  # calibrate
    quantizer: Quantizer = field(init=False)  # quantize
    narrow_files: Mapping[str, Path] = field(default_factory=dict)  # quantize: of int4-rowwise
    weight_bits: WeightBits | None = None  # choose weights
    arithmetic: Arithmetic | None = None  # choose arithmetic
    source_agreement: verify.SourceAgreement = field(init=False)  # compare with torch
    quantized_agreement: QuantizedAgreement | None = None  # judge
    examples: list[dict[str, Any]] = field(default_factory=list)  # judge: prompts with both answers
    sensitivity: tuple[Sensitivity, ...] = ()  # judge
    excluded: tuple[Exclusion, ...] = ()  # judge
    speeds: dict[str, Speed] = field(default_factory=dict)  # measure
    without_genai: str | None = None  # other runtimes: why onnxruntime-genai's files are not there

    @property
    def result(self) -> Path:
        """The folder that becomes the bundle."""
        return self.work / "bundle"

    @property
    def reference(self) -> Path:
        """The scratch folder of the fp32 graph."""
        return self.work / "fp32"

    @property
    def answers(self) -> Path:
        """The scratch folder of answers that others are held against."""
        return self.work / "answers"

    @property
    def not_run(self) -> tuple[str, ...]:
        """In words, what could not be tried on this machine."""
        wanted = self.profile.provider
        if self.provider == wanted:
            return ()
        return (
            f"nothing ran on {wanted}, which is not here: the graph was judged, and its speed measured, on "
            f"{self.provider}",
        )

    def model(self, kv: str) -> Model:
        """The manifest's description of the model with a cache of this type."""
        return replace(self.shape, kv=CacheType(kv, self.granularity if kv == "int8" else None))

    @contextmanager
    def session(self, folder: Path, kv: str, graph: str = names.GRAPH_NAME) -> Iterator[Session]:
        """The shipping runtime over a graph that was written: the quantized one on the target's provider, if it is
        here, the fp32 graph and all that is made of it for trial on the CPU, with fixed scales of an INT8 cache, which
        are the coarser ones."""
        provider, model = self.provider, self.model(kv)
        if folder != self.result:
            provider, model = providers.CPU, replace(model, kv=CacheType(kv, None))
        session = make_session(folder / graph, model, machine.default_threads(), [provider])
        try:
            yield session
        finally:
            session.close()


def save_graph(graph: ir.Model, folder: Path) -> None:
    """Write graph and weights. Weights are made one at a time, as they are written. torch's notes on nodes, stack
    traces with paths of this machine, stay out."""
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    ir.save(graph, folder / names.GRAPH_NAME, external_data=names.WEIGHTS_NAME)
