"""The gate's second half: the distance of the quantized graph's answers from the fp32 graph's.

`measure` compares a quantized graph with the stored answers of the fp32 graph (`reference.observe`), and `faults` lists
the target's limits that it misses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.evaluation.divergence import divergence, log_softmax
from ...runtime.sessions.protocol import Session
from ...targets import Gate
from .judging import WINDOW
from .reference import Passage, Reference, each_block, losses_of

# The perplexity of 5,000 tokens varies by 0.1 % and more at random: a rise counts only beyond two standard errors.
_ERRORS = 2
_POSITION_EDGES = (0, 1, 16, 64, 128, 256, WINDOW)


@dataclass(frozen=True)
class KindQuality:
    """The figures of `QuantizedAgreement` for the texts of one kind, or for the answers."""

    kind: str
    tokens: int
    mean_kl: float
    p99_kl: float
    perplexity_before: float
    perplexity_after: float
    agreement_percent: float
    decided_percent: float


@dataclass(frozen=True)
class PositionQuality:
    """Mean KL divergence at the positions `begin` to `end` - 1 of the windows; tokens: how many there are."""

    begin: int
    end: int
    tokens: int
    mean_kl: float


@dataclass(frozen=True)
class AnswerAgreement:
    """Greedy answers of both graphs to the same prompts.

    equal: answers that are the same to the end; first_differs: answers whose first token differs; decided_positions:
    positions of all answers where fp32's choice leads by the gate's margin; decided_percent: share of those where the
    quantized graph chooses the same after the same words; differs_at: for each prompt the index of the first different
    token, or None.
    """

    prompts: int
    tokens: int
    equal: int
    first_differs: int
    decided_positions: int
    decided_percent: float
    differs_at: tuple[int | None, ...]


@dataclass(frozen=True)
class QuantizedAgreement:
    """Quantized graph against fp32 graph, on `tokens` tokens of text in windows of up to `window`.

    mean_kl, p99_kl: KL divergence of the next token's distribution from fp32's, in nats, mean and 99th percentile;
    agreement_percent: positions with the same most likely token; decided_percent: the same among the
    `decided_positions`, where fp32's first choice leads by the gate's margin; perplexity_error_percent: standard error
    of the rise of perplexity, from the spread over the tokens; unknown_kinds: kinds of text that the model cannot read;
    only `kinds` has their figures.
    """

    perplexity_before: float
    perplexity_after: float
    perplexity_increase_percent: float
    perplexity_error_percent: float
    mean_kl: float
    p99_kl: float
    agreement_percent: float
    decided_percent: float
    decided_positions: int
    tokens: int
    window: int
    kinds: tuple[KindQuality, ...] = ()
    unknown_kinds: tuple[str, ...] = ()
    positions: tuple[PositionQuality, ...] = ()
    answers: AnswerAgreement | None = None

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return asdict(self)


@dataclass(frozen=True)
class _Held:
    """A passage compared with the quantized graph, an entry for each of its rows."""

    passage: Passage
    kl: NDArray[np.float64]
    losses: NDArray[np.float64]
    choices: NDArray[np.int64]


def measure(reference: Reference, session: Session, gate: Gate) -> QuantizedAgreement:
    """Compare a quantized graph with the fp32 graph's stored answers. Kinds of text that the model cannot read are
    measured, but do not count.

    gate: has the margin for decided positions. Cost: one run of all tokens. Raises: SessionError.
    """
    every_text = [_hold(passage, session) for passage in reference.texts]
    answers = [_hold(passage, session) for passage in reference.answers]
    unknown = reference.unknown_kinds()
    texts = [held for held in every_text if held.passage.kind not in unknown]
    whole = _figures("all", texts, gate)
    kinds = [
        _figures(kind, [held for held in every_text if held.passage.kind == kind], gate)
        for kind in dict.fromkeys(passage.kind for passage in reference.texts)
    ]
    leads = np.concatenate([held.passage.leads for held in texts])
    return QuantizedAgreement(
        perplexity_before=whole.perplexity_before,
        perplexity_after=whole.perplexity_after,
        perplexity_increase_percent=100 * (whole.perplexity_after / whole.perplexity_before - 1),
        perplexity_error_percent=100 * _standard_error(texts),
        mean_kl=whole.mean_kl,
        p99_kl=whole.p99_kl,
        agreement_percent=whole.agreement_percent,
        decided_percent=whole.decided_percent,
        decided_positions=int((leads >= gate.decided_margin).sum()),
        tokens=whole.tokens,
        window=max(len(passage.token_ids) for passage in reference.texts),
        kinds=tuple(kinds),
        unknown_kinds=unknown,
        positions=tuple(_by_position(texts)),
        answers=_compare_answers(answers, gate) if answers else None,
    )


def faults(result: QuantizedAgreement, gate: Gate) -> list[str]:
    """Each limit of the target that is missed, in words with figures; empty if the gate holds."""
    found = []
    # Written so that NaN fails too.
    if not result.mean_kl <= gate.mean_kl:
        found.append(
            f"the next token's distribution is {result.mean_kl:.3g} nats from fp32's, mean of {result.tokens} tokens"
            f"{_by_kind(result)}, the target allows {gate.mean_kl:g}"
        )
    if not result.p99_kl <= gate.p99_kl:
        found.append(f"at one token in 100 it is {result.p99_kl:.3g} nats and more, the target allows {gate.p99_kl:g}")
    least = result.perplexity_increase_percent - _ERRORS * result.perplexity_error_percent
    if not least <= gate.perplexity_increase_percent:
        found.append(
            f"perplexity rises by {result.perplexity_increase_percent:.2f} % ({result.perplexity_before:.4g} to "
            f"{result.perplexity_after:.4g}, standard error {result.perplexity_error_percent:.2f} %), the target "
            f"allows {gate.perplexity_increase_percent:g} %"
        )
    if not result.decided_percent >= gate.agreement_percent:
        found.append(
            f"the most likely token is the same at {result.decided_percent:.2f} % of the {result.decided_positions} "
            f"positions where fp32 is clear, the target asks for {gate.agreement_percent:g} %"
        )
    answers = result.answers
    if answers is not None and not answers.decided_percent >= gate.answers_percent:
        found.append(
            f"along fp32's answers to {answers.prompts} prompts it is the same at {answers.decided_percent:.2f} % of "
            f"the {answers.decided_positions} clear positions, the target asks for {gate.answers_percent:g} %"
        )
    return found


def _by_kind(result: QuantizedAgreement) -> str:
    if len(result.kinds) < 2:
        return ""
    judged = [kind for kind in result.kinds if kind.kind not in result.unknown_kinds]
    return " (" + ", ".join(f"{kind.kind} {kind.mean_kl:.3g}" for kind in judged) + ")"


def _hold(passage: Passage, session: Session) -> _Held:
    def compare(first: int, logits: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        rows = slice(first, first + len(logits))
        # A damaged scale gives NaN. No warning here: `faults` reports it.
        with np.errstate(invalid="ignore", over="ignore"):
            got = log_softmax(logits)
            kl = divergence(passage.log_probabilities(rows.start, rows.stop), got)
            return kl, losses_of(got, passage.targets[rows]), logits.argmax(axis=1)

    return _Held(passage, *each_block(session, passage.token_ids, passage.begin, compare))


def _figures(kind: str, held: Sequence[_Held], gate: Gate) -> KindQuality:
    kl = np.concatenate([item.kl for item in held])
    same = np.concatenate([item.choices == item.passage.choices for item in held])
    clear = np.concatenate([item.passage.leads for item in held]) >= gate.decided_margin
    before, after = (
        float(np.exp(min(np.concatenate(losses).mean(), 700.0)))
        for losses in ([item.passage.losses for item in held], [item.losses for item in held])
    )
    return KindQuality(
        kind=kind,
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        p99_kl=float(np.quantile(kl, 0.99)),
        perplexity_before=before,
        perplexity_after=after,
        agreement_percent=100 * float(same.mean()),
        decided_percent=_percent(same & clear, clear),
    )


def _standard_error(held: Sequence[_Held]) -> float:
    """Standard error of the mean difference of the losses, which for small values is the relative rise of
    perplexity."""
    differences = np.concatenate([item.losses - item.passage.losses for item in held])
    return float(differences.std() / np.sqrt(len(differences)))


def _by_position(held: Sequence[_Held]) -> Iterator[PositionQuality]:
    kl = np.concatenate([item.kl for item in held])
    positions = np.concatenate([np.arange(len(item.kl)) for item in held])
    for begin, end in pairwise(_POSITION_EDGES):
        chosen = kl[(positions >= begin) & (positions < end)]
        if len(chosen):
            yield PositionQuality(begin, end, len(chosen), float(chosen.mean()))


def _compare_answers(held: Sequence[_Held], gate: Gate) -> AnswerAgreement:
    # Compare with the answer's tokens, not with fp32's choice now: in a batch, fp32 may have broken a tie differently.
    each = [item.choices == item.passage.targets for item in held]
    differs = tuple(None if same.all() else int(np.argmin(same)) for same in each)
    same = np.concatenate(each)
    clear = np.concatenate([item.passage.leads for item in held]) >= gate.decided_margin
    return AnswerAgreement(
        prompts=len(held),
        tokens=len(same),
        equal=sum(position is None for position in differs),
        first_differs=sum(position == 0 for position in differs),
        decided_positions=int(clear.sum()),
        decided_percent=_percent(same & clear, clear),
        differs_at=differs,
    )


def _percent(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return 100 * float(part.sum()) / float(whole.sum()) if whole.any() else 100.0
