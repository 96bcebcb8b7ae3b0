"""The gate's second half: how far the quantized graph's answers are from those of the fp32 graph.

`observe` lets the fp32 graph read the judging texts and answer the prompts, once. `measure` holds a quantized graph
against that, as often as one is made, and `faults` says which of the target's limits it misses. An answer is judged
along the fp32 graph's own words: up to the first other token both graphs have read the same, so that what the
quantized graph would have written is known without letting it write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.decoding.batch import Batch, Row
from ...runtime.decoding.sequence import Greedy, Sequencer
from ...runtime.errors import VerificationError
from ...runtime.evaluation.divergence import divergence, log_softmax
from ...runtime.sessions.in_place import OrtSession
from ...runtime.sessions.protocol import Session, best_piece
from ...targets import Gate
from .judging import ANSWER_TOKENS, WINDOW, Judging
from .verify import lead

# Rows whose log probabilities are computed at once: some 6 MB of a vocabulary of 49,152, which stay in the processor.
_BLOCK = 32
# The perplexity of 5,000 tokens moves by 0.1 % and more for nothing: a rise is one that is beyond two standard errors.
_ERRORS = 2
_POSITION_EDGES = (0, 1, 16, 64, 128, 256, WINDOW)


@dataclass(frozen=True)
class KindQuality:
    """The same figures as `QuantizedAgreement`'s, on the texts of one kind, or on the answers."""

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

    equal: from beginning to end; first_differs: those that part at the first token; decided_positions: of all answers,
    where fp32's choice leads by the gate's margin; decided_percent: of those, where the quantized graph chooses the
    same after the same words; differs_at: for each prompt the first token that is another, None where none is.
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
    agreement_percent: positions with the same most likely token; decided_percent: the same among the positions where
    fp32's first choice leads by the gate's margin, of which there are `decided_positions`; perplexity_error_percent:
    standard error of the rise of perplexity, from the spread over the tokens; unknown_kinds: of the texts, which the
    model cannot read, so that only `kinds` has their figures.
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
class Passage:
    """Tokens that both graphs read, and what fp32 says behind each from `begin` on but the last.

    path: its log probabilities, float16 (n, vocab_size); choices: its most likely tokens (n); leads: how far they are
    ahead, in probability (n); losses: -log of the probability of the token that follows (n).
    """

    kind: str
    token_ids: list[int]
    begin: int
    path: Path
    choices: NDArray[np.int64]
    leads: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def targets(self) -> NDArray[np.int64]:
        """The tokens that follow (n)."""
        return np.asarray(self.token_ids[self.begin + 1 :], np.int64)


@dataclass(frozen=True)
class Reference:
    """What the fp32 graph says: to the texts, and in answer to each prompt (prompt and answer are one passage).

    vocab_size: outcomes of each distribution.
    """

    texts: tuple[Passage, ...]
    answers: tuple[Passage, ...]
    vocab_size: int

    def unknown_kinds(self) -> tuple[str, ...]:
        """Kinds of text that the model cannot read: it finds them less likely than tokens drawn at random, as a model
        of English stories finds code. Empty where all kinds are such ones, which then judge after all."""
        kinds = tuple(dict.fromkeys(passage.kind for passage in self.texts))
        unknown = tuple(kind for kind in kinds if not self._mean_loss(kind) <= np.log(self.vocab_size))
        return () if unknown == kinds else unknown

    def _mean_loss(self, kind: str) -> float:
        return float(np.concatenate([passage.losses for passage in self.texts if passage.kind == kind]).mean())


@dataclass(frozen=True)
class _Held:
    """A passage held against the quantized graph, an entry for each of its rows."""

    passage: Passage
    kl: NDArray[np.float64]
    losses: NDArray[np.float64]
    choices: NDArray[np.int64]


def observe(session: Session, judging: Judging, context_length: int, folder: Path) -> Reference:
    """Let the fp32 graph read the texts and answer the prompts.

    The log probabilities are kept in the folder, 2 bytes each: some 5,000 rows of a large vocabulary weigh as much as a
    model. float16 holds them to 2^-12 of their size; `measure` makes a distribution of them again, and the divergences
    are off by less than a thousandth. Cost: one run of all tokens. Raises: VerificationError where the logits are no
    numbers, SessionError.
    """
    texts = [
        _listen(session, kind, ids, 0, folder / f"text-{index}.npy") for index, (kind, ids) in enumerate(judging.texts)
    ]
    answers = []
    for index, ((shown, prompt), tokens) in enumerate(
        zip(judging.prompts, _greedy_answers(session, judging, context_length), strict=True)
    ):
        path = folder / f"answer-{index}.npy"
        answers.append(_listen(session, shown, [*prompt, *tokens], len(prompt) - 1, path))
    return Reference(tuple(texts), tuple(answers), np.load(texts[0].path, mmap_mode="r").shape[1])


def measure(reference: Reference, session: Session, gate: Gate) -> QuantizedAgreement:
    """Hold a quantized graph against what the fp32 graph said, for `faults` to judge. Kinds of text that the model
    cannot read are measured and count for nothing.

    gate: gives the margin from which on a position is decided. Cost: one run of all tokens. Raises: SessionError.
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
    """In words, with the figures, each limit of the target that is missed. Empty: the gate holds."""
    found = []
    # Written so that a figure that is not a number fails too.
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


def write_answers(
    reference: Reference, found: AnswerAgreement, session: Session, stop_ids: Sequence[int], most: int
) -> list[list[int]]:
    """The quantized graph's own greedy answers to the first `most` prompts, in tokens. Where an answer is fp32's from
    beginning to end, nothing runs."""
    sequencer = Sequencer(session)
    session.rewind(0)
    answers = []
    for passage, differs in zip(reference.answers[:most], found.differs_at, strict=False):
        answer = passage.token_ids[passage.begin + 1 :]
        if differs is not None:
            known = passage.token_ids[: passage.begin + 1 + differs]
            answer = answer[:differs] + list(sequencer.greedy(known, ANSWER_TOKENS - differs, stop_ids))
        answers.append(answer)
    return answers


def _by_kind(result: QuantizedAgreement) -> str:
    if len(result.kinds) < 2:
        return ""
    judged = [kind for kind in result.kinds if kind.kind not in result.unknown_kinds]
    return " (" + ", ".join(f"{kind.kind} {kind.mean_kl:.3g}" for kind in judged) + ")"


def _greedy_answers(session: Session, judging: Judging, context_length: int) -> list[list[int]]:
    """The answers to all prompts, side by side where the session has rows for that, which reads the weights once."""
    lengths = [min(ANSWER_TOKENS, context_length - len(prompt)) for _, prompt in judging.prompts]
    prompts = [(prompt, length) for (_, prompt), length in zip(judging.prompts, lengths, strict=True)]
    if not prompts:
        return []
    if not isinstance(session, OrtSession):
        sequencer = Sequencer(session)
        session.rewind(0)
        return [list(sequencer.greedy(prompt, length, judging.stop_ids)) for prompt, length in prompts]
    rows = [Row(prompt, length, Greedy(), judging.stop_ids) for prompt, length in prompts]
    for _ in Batch(session.rows(len(rows)), rows, context_length).tokens():
        pass
    return [row.known[len(row.token_ids) :] for row in rows]


def _listen(session: Session, kind: str, ids: list[int], begin: int, path: Path) -> Passage:
    """Run a passage with the fp32 graph and keep what it says."""
    probabilities, choices, leads, losses = None, [], [], []
    done = 0
    for logits in _blocks(session, ids, begin):
        if not np.isfinite(logits).all():
            token = begin + done + int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]) + 1
            raise VerificationError(
                f"the fp32 graph's logits are not all finite numbers behind token {token} of {kind!r:.60}: the model's "
                "weights are damaged, or its activations are beyond float32: download it again"
            )
        expected = log_softmax(logits)
        if probabilities is None:
            shape = (len(ids) - 1 - begin, logits.shape[1])
            probabilities = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        probabilities[done : done + len(logits)] = expected
        choices.append(logits.argmax(axis=1))
        leads.append(lead(logits))
        losses.append(_losses(expected, ids[begin + done + 1 : begin + done + 1 + len(logits)]))
        done += len(logits)
    return Passage(kind, ids, begin, path, np.concatenate(choices), np.concatenate(leads), np.concatenate(losses))


def _hold(passage: Passage, session: Session) -> _Held:
    expected = np.load(passage.path, mmap_mode="r")
    kl, losses, choices = [], [], []
    done = 0
    # What a quantized graph makes of a damaged scale is no number, and no warning either: `faults` says it.
    with np.errstate(invalid="ignore", over="ignore"):
        for logits in _blocks(session, passage.token_ids, passage.begin):
            rows = slice(done, done + len(logits))
            got = log_softmax(logits)
            kl.append(divergence(log_softmax(np.asarray(expected[rows], np.float32)), got))
            losses.append(_losses(got, passage.targets[rows]))
            choices.append(logits.argmax(axis=1))
            done += len(logits)
    return _Held(passage, np.concatenate(kl), np.concatenate(losses), np.concatenate(choices))


def _blocks(session: Session, token_ids: Sequence[int], begin: int) -> Iterator[NDArray[np.float32]]:
    """Logits behind each token from `begin` on but the last, a few rows at a time."""
    session.rewind(0)
    size = best_piece(session)
    for start in range(0, len(token_ids) - 1, size):
        piece = token_ids[start : min(start + size, len(token_ids) - 1)]
        wanted = min(len(piece), max(0, start + len(piece) - begin))
        logits = session.step(piece, wanted)
        for row in range(0, wanted, _BLOCK):
            yield logits[row : row + _BLOCK]


def _losses(log_probabilities: NDArray[np.float32], targets: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    return -log_probabilities[np.arange(len(targets)), targets].astype(np.float64)


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
    """Of the mean difference of the losses, which is the relative rise of perplexity as long as both are small."""
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
    # Against the tokens of the answer: side by side with others, fp32 may have broken a tie the other way than alone.
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
