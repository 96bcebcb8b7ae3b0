"""What a step bought and what it cost, measured on the quantized graph in the runtime that ships."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.bundle import folder as names
from ...runtime.bundle.manifest import CacheType, Model
from ...runtime.evaluation.scoring import negative_log_likelihood, score
from ...runtime.evaluation.speed import measure_speed
from ...runtime.host import machine
from ...runtime.sessions.loading import make_session
from ...runtime.sessions.protocol import Session
from ...runtime.sessions.providers import CPU
from ...targets import Profile
from ..errors import TraceError
from ..passes import fusing_passes
from ..quantization.hessians import make_block_quantizer
from ..quantization.schemes import Quantizer
from ..tracing.attention import TracedModel
from ..tracing.ways import PATHS, refused
from .weights_int4 import SCHEME, noted_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_TOKENS = 2048
_WINDOW = 512
_SPEED_PROMPT = 128


@dataclass(frozen=True)
class Figures:
    """A model after INT8, or whichever scheme is the target's, with a float32 cache.

    bytes: graph and weights; perplexity: of up to 2,048 tokens of the text in windows of 512; agreement_percent: its
    positions where the most likely token is the source's; decode_tokens_per_s: on 128 tokens of context.
    """

    parameters: int
    bytes: int
    perplexity: float
    agreement_percent: float
    decode_tokens_per_s: float


class Meter:
    """Measures one module after another against the first one.

    Cost, each time: a trace, and two passes over the text; disk for the float32 and the quantized weights, in `folder`.
    """

    def __init__(self, profile: Profile, token_ids: Sequence[int], context_length: int, folder: Path) -> None:
        self._profile, self._folder = profile, folder
        self._ids, self._context = list(token_ids[:_MOST_TOKENS]), context_length
        self._first: NDArray[np.int64] | None = None

    def measure(self, module: PreTrainedModel) -> Figures:
        """Raises: TraceError where the module cannot be traced."""
        self._folder.mkdir()
        try:
            model = self._write(module)
            size = sum((self._folder / name).stat().st_size for name in (names.GRAPH_NAME, names.WEIGHTS_NAME))
            session = make_session(self._folder / names.GRAPH_NAME, model, machine.default_threads(), [CPU])
            try:
                perplexity, agreement = self._judge(session)
                room = max(1, min(_SPEED_PROMPT, self._context - 1, len(self._ids)))
                speed = measure_speed(session, self._ids[:room]).decode_tokens_per_s
            finally:
                session.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return Figures(module.num_parameters(), size, perplexity, agreement, speed)

    def _write(self, module: PreTrainedModel) -> Model:
        traced = _trace(module)
        ir.passes.PassManager(fusing_passes(self._context))(traced.graph)
        plain = self._folder / "fp32.onnx"
        ir.save(traced.graph, plain, external_data="fp32.onnx.data")
        # Without float16, which changes neither what a step costs nor what it buys.
        noted = noted_weights(module)
        blocks = make_block_quantizer(noted, plain, self._ids, self._context) if noted is not None else None
        scheme = self._profile.scheme if noted is None else SCHEME
        quantizer = Quantizer(plain, scheme, self._profile.weight_bits, {}, blocks=blocks)
        ir.save(quantizer.quantized(()), self._folder / names.GRAPH_NAME, external_data=names.WEIGHTS_NAME)
        return Model(
            vocab_size=int(module.config.get_text_config().vocab_size),
            context_length=self._context,
            parameters=module.num_parameters(),
            layers=traced.layers,
            kv=CacheType("float32", None),
            cache_layout=traced.layout,
            states=traced.states,
            step_tokens=traced.step_tokens,
        )

    def _judge(self, session: Session) -> tuple[float, float]:
        window = max(2, min(_WINDOW, self._context, len(self._ids)))
        loss, count, likely = 0.0, 0, []
        for targets, logits in score(session, self._ids, window, window // 2):
            loss, count = loss + float(negative_log_likelihood(logits, targets).sum()), count + len(targets)
            likely.append(logits.argmax(axis=1))
        chosen = np.concatenate(likely)
        self._first = chosen if self._first is None else self._first
        return float(np.exp(loss / count)), float(100 * (chosen == self._first).mean())


def _trace(module: PreTrainedModel) -> TracedModel:
    """By the first path that the model can go. Whether it answers as torch does is the export's to prove."""
    refusals: list[str] = []
    last: TraceError | None = None
    for name, trace in PATHS:
        try:
            return trace(module)
        except TraceError as error:
            refusals.append(f"{name}: {error}")
            last = error
    raise refused(f"{type(module).__name__} cannot be traced", refusals) from last
