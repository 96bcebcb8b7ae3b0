"""The gate for the INT8 cache: find values beyond the calibrated ranges at export, not in use.

A channel's range is the largest value in a short text, plus a margin. The scales are tested on prompts that did not
calibrate them (`cache_prompts`). Measured are the keys and values beyond their channel's range, which the operator
clips, and the distance of the fp32 graph's answers with an INT8 cache from those with a float32 cache. If values are
far beyond, or the answers miss the target's aim, these channels are widened until they hold all values seen, and the
answers are judged again. Wide scales are coarse: a model that still misses the target's limit cannot have an INT8
cache.

The fixed scales are judged, as onnxruntime's own operator uses them. Kernels add a scale for each key and value, so
nothing is clipped: their answers are closer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import VerificationError
from ...runtime.evaluation.divergence import divergence, lead
from ...runtime.sessions.in_place import OrtSession
from ...runtime.sessions.protocol import Session
from ...targets import Gate
from ..quantization.calibration import Ranges, cache_ranges, magnitudes, wider
from .cache_prompts import CachePrompts
from .sensitivity import log_probabilities

# The margin. Other texts exceed every calibrated maximum, by up to two times. SmolLM2-135M on 1,024 tokens of
# WikiText-2, KL divergence with ranges of 1, 1.25, 1.5 and 2 times the maximum in 2,300 other tokens: 0.0018, 0.0011,
# 0.0012, 0.0024 nats. Clipping costs more than a coarser scale.
_MARGIN = 1.25
# Values beyond this multiple of a range widen it. On SmolLM2-135M the largest value of rare tokens is at 1.8: widening
# for it gains 1e-4 nats on text, and costs a second trial of all prompts.
_TOLERATED_EXCESS = 2.0
_MOST_EXCESS = 1e6  # a finite number for a channel that was always zero

# Opens a session on the fp32 graph with an INT8 cache with these ranges.
CacheProbe = Callable[[Ranges], AbstractContextManager[Session]]


@dataclass(frozen=True)
class LayerExcess:
    """Keys and values of a layer beyond their ranges. largest_excess: of a value, in units of its channel's range."""

    layer: int
    clipped_percent: float
    largest_excess: float


@dataclass(frozen=True)
class KindAgreement:
    """The INT8 cache compared with the float32 cache on one kind of prompts.

    kl: mean KL divergence of the next token's distribution, in nats; decided_positions: positions where float32's first
    choice leads by the gate's margin; agree_decided: those where INT8 has the same first choice.
    """

    kind: str
    tokens: int
    kl: float
    decided_positions: int
    agree_decided: int


@dataclass(frozen=True)
class CacheAgreement:
    """How good the scales are on prompts that did not calibrate them.

    clipped_percent, layers (those with clipped values, worst first): with the calibrated scales; widened_channels:
    channels that then got a wider range; kinds: the answers with the bundle's scales; kinds_before_widening: with the
    calibrated scales, empty if they are the same.
    """

    clipped_percent: float
    largest_excess: float
    layers: tuple[LayerExcess, ...]
    widened_channels: int
    kinds: tuple[KindAgreement, ...]
    kinds_before_widening: tuple[KindAgreement, ...]

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return asdict(self)


@dataclass(frozen=True)
class _Observed:
    """The judging prompts with the float32 cache: its values, and the answers as files of log probabilities."""

    largest: Ranges
    clipped: Mapping[str, int]
    values: Mapping[str, int]
    answers: Sequence[Path]


def calibrate_cache(
    reference: Callable[[], AbstractContextManager[Session]],
    probe: CacheProbe,
    prompts: CachePrompts,
    gate: Gate,
    folder: Path,
) -> tuple[Ranges, CacheAgreement]:
    """Ranges for the scales of the INT8 cache, and how good they are. reference: opens a session on the fp32 graph.

    The float32 cache's answers are stored in the folder, so that the weights need not be in memory twice. Cost: all
    prompts with the fp32 graph, and the judging ones once more, or twice if ranges are widened. Raises:
    VerificationError.
    """
    with reference() as session:
        assert isinstance(session, OrtSession), "an int8 cache is one that the operator writes in place"
        seen = cache_ranges(session, prompts.calibrating)
        ranges: Ranges = {name: np.float32(_MARGIN) * values for name, values in seen.items()}
        observed = _observe(session, prompts, ranges, folder)

    def judge(tried: Ranges) -> tuple[KindAgreement, ...]:
        with probe(tried) as session:
            return tuple(_compare(session, prompts, observed.answers, gate))

    layers = _excesses(observed, ranges)
    before: tuple[KindAgreement, ...] = ()
    kinds, widened = judge(ranges), 0
    far = any(layer.largest_excess > _TOLERATED_EXCESS for layer in layers)
    if far or (layers and not kinds[0].kl <= gate.cache_kl):
        wide = wider(ranges, observed.largest)
        widened = sum(int((wide[name] > ranges[name]).sum()) for name in ranges)
        ranges, before = wide, kinds
        kinds = judge(ranges)
    if _faults(kinds, gate):
        raise _error(kinds, layers, gate)
    share = 100 * sum(observed.clipped.values()) / max(1, sum(observed.values.values()))
    largest = max((layer.largest_excess for layer in layers), default=1.0)
    return ranges, CacheAgreement(share, largest, layers, widened, kinds, before)


def _observe(session: OrtSession, prompts: CachePrompts, ranges: Ranges, folder: Path) -> _Observed:
    largest: Ranges = {}
    clipped, values = dict.fromkeys(ranges, 0), dict.fromkeys(ranges, 0)
    answers = []
    for index, (_, prompt) in enumerate(prompts.judging):
        answers.append(folder / f"cache-answer-{index}.npy")
        np.save(answers[-1], np.concatenate(list(log_probabilities(session, prompt))))
        found = magnitudes(session)
        largest = wider(largest, {name: seen.max(axis=1) for name, seen in found.items()})
        for name, seen in found.items():
            clipped[name] += int((seen > ranges[name][:, None]).sum())
            values[name] += seen.size
    return _Observed(largest, clipped, values, answers)


def _excesses(observed: _Observed, ranges: Ranges) -> tuple[LayerExcess, ...]:
    found = []
    for layer in sorted({int(name.split(".")[0]) for name in ranges}):
        sides = [f"{layer}.key", f"{layer}.value"]
        count = sum(observed.clipped[side] for side in sides)
        if count:
            ratios = [observed.largest[side] / np.maximum(ranges[side], np.finfo(np.float32).tiny) for side in sides]
            excess = min(_MOST_EXCESS, max(float(ratio.max()) for ratio in ratios))
            found.append(LayerExcess(layer, 100 * count / sum(observed.values[side] for side in sides), excess))
    return tuple(sorted(found, key=lambda item: -item.largest_excess))


def _compare(session: Session, prompts: CachePrompts, answers: Sequence[Path], gate: Gate) -> Iterator[KindAgreement]:
    """Compare answers with an INT8 cache with the stored ones, for each kind of prompts."""
    for kind in dict.fromkeys(kind for kind, _ in prompts.judging):
        tokens = decided = agree = 0
        total = 0.0
        for (other, prompt), path in zip(prompts.judging, answers, strict=True):
            if other == kind:
                rows = _rows(prompt, np.load(path, mmap_mode="r"), session)
                for expected, got in rows:
                    clear = lead(expected) >= gate.decided_margin
                    tokens, decided = tokens + len(got), decided + int(clear.sum())
                    agree += int((clear & (expected.argmax(axis=1) == got.argmax(axis=1))).sum())
                    total += float(divergence(expected, got).sum())
        yield KindAgreement(kind, tokens, total / tokens, decided, agree)


def _rows(
    prompt: Sequence[int], expected: NDArray[np.float32], session: Session
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    begin = 0
    for got in log_probabilities(session, prompt):
        yield expected[begin : begin + len(got)], got
        begin += len(got)


def _faults(kinds: Sequence[KindAgreement], gate: Gate) -> list[str]:
    """Each limit that is missed, in words; empty if the gate holds."""
    # Written so that NaN fails too.
    found = [
        f"on {kind.kind} the next token's distribution is {kind.kl:.3g} nats from that of a float32 cache, the target "
        f"allows {gate.cache_kl_limit}"
        for kind in kinds
        if not kind.kl <= gate.cache_kl_limit
    ]
    decided, agree = sum(kind.decided_positions for kind in kinds), sum(kind.agree_decided for kind in kinds)
    if decided and not 100 * agree / decided >= gate.agreement_percent:
        found.append(
            f"the most likely token is the same at {100 * agree / decided:.2f} % of the {decided} positions where "
            f"float32 is clear, the target asks for {gate.agreement_percent} %"
        )
    return found


def _error(kinds: Sequence[KindAgreement], layers: Sequence[LayerExcess], gate: Gate) -> VerificationError:
    far = [layer for layer in layers if layer.largest_excess > _TOLERATED_EXCESS][:8]
    where = ", ".join(f"layer {layer.layer} ({layer.largest_excess:.3g} times)" for layer in far)
    why = f"; keys or values beyond what the text shows: {where}" if far else ""
    return VerificationError(
        f"the INT8 cache does not suit this model: {'; '.join(_faults(kinds, gate))}{why}: use --kv float32"
    )
