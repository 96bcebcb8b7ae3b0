"""The gate's second half: a quantized graph that misses the target's tolerance gets its worst matrices back in float32.

The fewest first, in the order of what quantization costs each of them alone, until the tolerances hold. Half of the
matrices is the limit: what needs more is no quantized model, and the export fails with the figures. So it does where
the INT8 cache alone misses the tolerances, which no matrix can mend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..runtime.errors import VerificationError
from ..runtime.manifest import Exclusion
from ..runtime.session import Session
from ..targets import Gate
from .sensitivity import Probe, Sensitivity, measure_sensitivity
from .verify import QuantizedAgreement, compare_quantized, faults

_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Where the gate holds at once, sensitivities are for the report only. They are measured then if one probe a matrix
# loads no more fp32 weights than this in all, which takes seconds.
_CHEAP_PROBE_BYTES = 1 << 30

# Quantizes all but the matrices of these names, and holds the result against the fp32 graph.
Attempt = Callable[[Collection[str]], QuantizedAgreement]


@dataclass(frozen=True)
class Candidate:
    """A quantized graph that was written, and how to make others in its place.

    reference, quantized: open a session on the fp32 graph, of `reference_bytes`, and on the quantized one; write: write
    the quantized graph anew, with the matrices of these names left in float32; matrices: all that are quantized.
    """

    reference: Callable[[], AbstractContextManager[Session]]
    reference_bytes: int
    quantized: Callable[[], AbstractContextManager[Session]]
    write: Callable[[Collection[str]], None]
    probe: Probe
    matrices: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """What the graph that is written now measured; sensitivity: worst first, empty where it was not measured."""

    agreement: QuantizedAgreement
    sensitivity: tuple[Sensitivity, ...]
    excluded: tuple[Exclusion, ...]


def judge(candidate: Candidate, token_ids: Sequence[int], window: int, gate: Gate) -> Verdict:
    """Hold the quantized graph against the fp32 graph on a text, and repair it where it misses the tolerances.

    Cost: one scoring of the text with both graphs, and with a repair up to 11 more and the probes of
    `edgelm.export.sensitivity`. Raises: VerificationError.
    """
    with candidate.reference() as before:

        def compare() -> QuantizedAgreement:
            with candidate.quantized() as after:
                return compare_quantized(before, after, token_ids, window, gate)

        def attempt(excluded: Collection[str]) -> QuantizedAgreement:
            candidate.write(excluded)
            return compare()

        first = compare()
        holds = not faults(first, gate)
        cheap = len(candidate.matrices) * candidate.reference_bytes <= _CHEAP_PROBE_BYTES
        if holds and not cheap:
            return Verdict(first, (), ())
        ranked = tuple(measure_sensitivity(before, candidate.probe, candidate.matrices, token_ids[:window]))
        agreement, excluded = (first, ()) if holds else repair(first, ranked, attempt, gate)
        return Verdict(agreement, ranked, excluded)


def repair(
    before: QuantizedAgreement, ranked: Sequence[Sensitivity], attempt: Attempt, gate: Gate
) -> tuple[QuantizedAgreement, tuple[Exclusion, ...]]:
    """Leave matrices in float32 until the gate holds. The last attempt made is the one that is returned.

    before: what missed the gate; ranked: all matrices, worst first. Cost: at most 11 attempts. Raises:
    VerificationError, with the figures of the first and the last attempt, if the gate never holds.
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
