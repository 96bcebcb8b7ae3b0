"""The gate's verdict: attempts at a quantized graph are judged one after another until one passes.

The scheme's attempts come first, in their order. If none passes and the scheme allows it, the worst matrices go back to
float32: as few as possible, ranked by the loss of quantizing each alone. At most half of the matrices may go back;
otherwise the export fails with the figures. It also fails if the INT8 cache alone misses the limits, which no matrix
can repair. The row-wise schemes are not repaired in this way: a float32 matrix costs at least four times its bytes on
every token, and breaks the guarantee of equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ...runtime.bundle.manifest import Exclusion
from ...runtime.errors import VerificationError
from ...runtime.sessions.protocol import Session
from ...targets import Gate
from .judging import Judging
from .quality import QuantizedAgreement, faults, measure
from .reference import Reference, observe
from .sensitivity import LAYER_RUNS, Measure, Probe, Sensitivity, by_layers, by_matrix

_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# If the gate passes at once, sensitivities are only for the report. They are measured for each matrix if all probes
# together load no more fp32 bytes than the first number, which takes seconds; for runs of layers if those probes load
# no more than the second.
_CHEAP_PROBE_BYTES, _CHEAP_LAYERS_BYTES = 1 << 30, 8 << 30

# Quantizes all except the named matrices, and compares the result with the fp32 graph.
Repair = Callable[[Collection[str]], QuantizedAgreement]


@dataclass(frozen=True)
class Attempt:
    """One way to quantize. name: in words, for errors ("with 16-bit activations in all matrices"); write: writes the
    graph, replacing the one before; probe: opens the fp32 graph with some matrices quantized in this way."""

    name: str
    write: Callable[[], None]
    probe: Probe


@dataclass(frozen=True)
class Candidate:
    """How to make and open the graphs that are judged.

    reference, quantized: open a session on the fp32 graph, of `reference_bytes`, and on the quantized one as it is
    written; attempts: at least one, the first that passes is taken; leave_out: writes the quantized graph with the
    named matrices in float32, None for a scheme that is not repaired; remedy: what the user can do if nothing passes;
    matrices: all that are quantized.
    """

    reference: Callable[[], AbstractContextManager[Session]]
    reference_bytes: int
    quantized: Callable[[], AbstractContextManager[Session]]
    attempts: Sequence[Attempt]
    leave_out: Callable[[Collection[str]], None] | None
    remedy: str
    matrices: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """The measurements of the written graph; reference: what it was compared with; attempt: the name of the one that
    passed, or of the last one if matrices were left out; sensitivity: worst first, empty if not measured."""

    agreement: QuantizedAgreement
    reference: Reference
    attempt: str
    sensitivity: tuple[Sensitivity, ...]
    excluded: tuple[Exclusion, ...]


def judge(candidate: Candidate, judging: Judging, context_length: int, gate: Gate, folder: Path) -> Verdict:
    """Judge the attempts until one is within the limits; if none is, repair the last one.

    folder: as `observe`. Cost: one run of the judging texts with the fp32 graph and one with each attempt; with a
    repair up to 11 more and the probes of `edgelm.export.gate.sensitivity`. Raises: VerificationError.
    """
    with candidate.reference() as session:
        reference = observe(session, judging, context_length, folder)

    def compare() -> QuantizedAgreement:
        with candidate.quantized() as after:
            return measure(reference, after, gate)

    tried: list[tuple[Attempt, QuantizedAgreement]] = []
    for attempt in candidate.attempts:
        attempt.write()
        tried.append((attempt, compare()))
        if not faults(tried[-1][1], gate):
            return Verdict(tried[-1][1], reference, attempt.name, _for_the_report(candidate, attempt, reference), ())
    if candidate.leave_out is None:
        raise _none_holds(tried, gate, candidate.remedy)

    def leave_out(excluded: Collection[str]) -> QuantizedAgreement:
        assert candidate.leave_out is not None
        candidate.leave_out(excluded)
        return compare()

    ranked = tuple(by_matrix(reference.texts[0], tried[-1][0].probe, candidate.matrices))
    agreement, exclusions = repair(tried[-1][1], ranked, leave_out, gate)
    return Verdict(agreement, reference, tried[-1][0].name, ranked, exclusions)


def _for_the_report(candidate: Candidate, attempt: Attempt, reference: Reference) -> tuple[Sensitivity, ...]:
    """Sensitivities as detailed as time allows."""
    measure: Measure
    if len(candidate.matrices) * candidate.reference_bytes <= _CHEAP_PROBE_BYTES:
        measure = by_matrix
    elif LAYER_RUNS * candidate.reference_bytes <= _CHEAP_LAYERS_BYTES:
        measure = by_layers
    else:
        return ()
    return tuple(measure(reference.texts[0], attempt.probe, candidate.matrices))


def _none_holds(tried: Sequence[tuple[Attempt, QuantizedAgreement]], gate: Gate, remedy: str) -> VerificationError:
    figures = "; ".join(f"{attempt.name}: {', '.join(faults(found, gate))}" for attempt, found in tried)
    return VerificationError(f"the quantized model is too far from the original: {figures}: use {remedy}")


def repair(
    before: QuantizedAgreement, ranked: Sequence[Sensitivity], attempt: Repair, gate: Gate
) -> tuple[QuantizedAgreement, tuple[Exclusion, ...]]:
    """Leave more and more matrices in float32 until the gate passes. Returns the last attempt.

    before: the figures that failed; ranked: all matrices, worst first. Cost: at most 11 attempts. Raises:
    VerificationError, with the figures of the first and the last attempt, if the gate never passes.
    """
    if not ranked:
        raise _error(before, gate, "--kv float32")
    after = attempt(_matrices(ranked))
    if faults(after, gate):
        raise _error(before, gate, "--kv float32", f"; with all matrices in float32: {'; '.join(faults(after, gate))}")
    tried = ""
    for count in _counts(len(ranked)):
        worst = ranked[:count]
        after = attempt(_matrices(worst))
        if not faults(after, gate):
            return after, tuple(_exclusions(worst, before))
        tried = f"; with {', '.join(item.name for item in worst)} in float32: {'; '.join(faults(after, gate))}"
    raise _error(before, gate, "--scheme fp32", tried)


def _error(before: QuantizedAgreement, gate: Gate, remedy: str, tried: str = "") -> VerificationError:
    missed = "; ".join(faults(before, gate))
    return VerificationError(f"the quantized model is too far from the original: {missed}{tried}: use {remedy}")


def _matrices(items: Sequence[Sensitivity]) -> set[str]:
    return {name for item in items for name in item.matrices}


def _counts(available: int) -> Iterator[int]:
    return (count for count in _ROUNDS if count <= available // 2)


def _exclusions(worst: Sequence[Sensitivity], before: QuantizedAgreement) -> Iterator[Exclusion]:
    for item in worst:
        alone = "it alone" if len(item.matrices) == 1 else f"{item.name} alone"
        reason = (
            f"left as it was: quantizing {alone} costs {item.kl:.3g} nats of KL divergence a token; with all quantized "
            f"perplexity rose by {before.perplexity_increase_percent:.2f} % and the most likely token was the same at "
            f"{before.decided_percent:.2f} % of the positions where fp32 is clear"
        )
        yield from (Exclusion(name, reason) for name in item.matrices)
