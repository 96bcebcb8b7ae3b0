"""The gate's first half: does the fp32 graph answer as the model does? Measured with the runtime that ships, never with
a stand-in. `quality` is the second half.

`ask_source` lets torch answer, and `compare_with_source` holds the fp32 graph against these answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle.manifest import Model
from ...runtime.decoding.sequence import Sequencer
from ...runtime.errors import VerificationError
from ...runtime.sessions.protocol import Session
from ...targets import Gate
from ..source.loading import cache_argument
from .trials import Trial, make_trials, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SourceAgreement:
    """fp32 graph against torch.

    logit_difference: largest absolute difference over a prompt and its continuation, in units of torch's largest
    magnitude there, of the worst prompt; steps: greedy steps of torch; equal_steps: those that the graph took too, up
    to the first other token of each prompt; near_ties: prompts where the two part at a token that torch holds as
    likely, up to the tolerance; prompts and longest_prompt (tokens): what was tried; left_out: what lies beyond it.
    """

    logit_difference: float
    steps: int
    equal_steps: int
    near_ties: int
    prompts: int
    longest_prompt: int
    left_out: tuple[str, ...]

    def measured(self) -> dict[str, Any]:
        """As plain data for a report."""
        return asdict(self)


@dataclass(frozen=True)
class SourceAnswer:
    """torch's answer to one prompt: greedy tokens, and logits float32 (tokens of prompt and answer, vocab_size)."""

    prompt: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class SourceAnswers:
    """torch's answers to the prompts of `edgelm.export.gate.trials`, and what these prompts could not reach."""

    answers: tuple[SourceAnswer, ...]
    left_out: tuple[str, ...]


def ask_source(model: PreTrainedModel, token_ids: Sequence[int], shape: Model, folder: Path) -> SourceAnswers:
    """Let torch answer the prompts of `edgelm.export.gate.trials`, which says what they are and cost.

    token_ids: the text; shape: context, vocabulary and layers of the graph. The logits are written to the folder and
    mapped from there: a thousand rows of a large vocabulary weigh as much as a model. Prompts that are alike in length
    and steps are decoded as rows of one batch, which reads the weights once for all of them; the logits come from one
    pass over each prompt and its answer by itself, without a cache. Raises: VerificationError where they are no
    numbers.
    """
    trials, left_out = make_trials(token_ids, shape, model.config)
    alike: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        alike.setdefault((len(trial.prompt), trial.steps), []).append(trial)
    answers: list[SourceAnswer] = []
    for group in alike.values():
        for trial, tokens in zip(group, _torch_greedy(model, group, shape.context_length), strict=True):
            path = folder / f"logits-{len(answers)}.npy"
            np.save(path, _require_numbers(_torch_logits(model, trial.prompt + tokens)))
            answers.append(SourceAnswer(trial.prompt, tokens, np.load(path, mmap_mode="r")))
    return SourceAnswers(tuple(answers), left_out)


def compare_with_source(source: SourceAnswers, session: Session, gate: Gate) -> SourceAgreement:
    """Hold greedy tokens and logits of the fp32 graph against torch's answers.

    1. The graph gets each prompt and torch's answer in pieces that are cut in random places. Every logit is compared,
       and the most likely token at each step of the answer: equal ones are the tokens that greedy decoding gives.
    2. Of the prompts of each length the first is decoded by the runtime's own loop, one token a step. The others would
       run the same operators and shapes again, at the price of reading all weights for each token.

    Raises: VerificationError outside the tolerance.
    """
    draw = np.random.default_rng(0)
    difference = 0.0
    equal = total = ties = 0
    lengths: set[int] = set()
    for answer in source.answers:
        off, tokens = _compare_in_pieces(session, answer, draw)
        same = _equal_steps(answer, tokens, gate)
        if len(answer.prompt) not in lengths:
            lengths.add(len(answer.prompt))
            session.rewind(0)
            same = min(same, _equal_steps(answer, list(_greedy(session, answer)), gate))
        difference, equal, total = max(difference, off), equal + same, total + len(answer.tokens)
        ties += same < len(answer.tokens)
    result = SourceAgreement(difference, total, equal, ties, len(source.answers), max(lengths), source.left_out)
    if not result.logit_difference <= gate.logit_difference:
        raise VerificationError(
            f"the traced graph's logits are off by {result.logit_difference:.3g} of the largest, the target allows "
            f"{gate.logit_difference:.3g}: this model cannot be exported"
        )
    return result


def _greedy(session: Session, answer: SourceAnswer) -> Iterator[int]:
    return Sequencer(session).greedy(answer.prompt, len(answer.tokens), ())


def _compare_in_pieces(session: Session, answer: SourceAnswer, draw: np.random.Generator) -> tuple[float, list[int]]:
    """Feed a prompt and torch's answer in random pieces.

    Returns: the largest difference to torch's logits, in units of their largest magnitude, and the graph's most likely
    token for each step of the answer.
    """
    session.rewind(0)
    largest = 0.0
    likeliest: list[int] = []
    for piece in pieces(answer.prompt + answer.tokens, draw):
        begin = session.length
        got = _require_numbers(session.step(piece, len(piece)))
        largest = max(largest, float(np.abs(got - answer.logits[begin : begin + len(piece)]).max()))
        likeliest += got.argmax(axis=1).tolist()
    return largest / float(np.abs(answer.logits).max()), likeliest[len(answer.prompt) - 1 : -1]


def _require_numbers(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not (np.isfinite(logits).all() and logits.any()):
        raise VerificationError(
            "the model's logits are not all finite numbers, or all zero: its weights are damaged, download it again"
        )
    return logits


def _equal_steps(answer: SourceAnswer, tokens: list[int], gate: Gate) -> int:
    """How many steps give torch's token. After the first other one the texts differ, so it must be a near-tie: a token
    that torch holds as likely as its own, up to the tolerance of the logits. Raises: VerificationError."""
    pairs = enumerate(zip(tokens, answer.tokens, strict=True))
    step = next((index for index, (got, wanted) in pairs if got != wanted), len(tokens))
    if step == len(tokens):
        return step
    row, got, wanted = answer.logits[len(answer.prompt) + step - 1], tokens[step], answer.tokens[step]
    gap = float(row[wanted] - row[got])
    if not gap <= gate.logit_difference * float(np.abs(answer.logits).max()):
        raise VerificationError(
            f"the traced graph does not answer as the model does: after the prompt {answer.prompt}, step {step + 1} "
            f"gives token {got}, torch gives {wanted}, ahead by {gap:.3g}: this model cannot be exported"
        )
    return step


def _torch_greedy(model: PreTrainedModel, trials: Sequence[Trial], context_length: int) -> list[list[int]]:
    """The most likely tokens of each trial, as far as the context has room. trials: alike in length and steps, so that
    as rows of one batch they need no padding. Not by `generate`: the model's own generation configuration may ask for
    penalties and end tokens, and fills in whatever another one leaves open."""
    import torch

    name = cache_argument(model)
    count = max(1, min(trials[0].steps, context_length - len(trials[0].prompt)))
    step, cache = torch.tensor([trial.prompt for trial in trials]), None
    chosen = []
    with torch.no_grad():
        for _ in range(count):
            output = model(step, use_cache=True, **{name: cache})
            cache = getattr(output, name)
            step = output.logits[:, -1:].argmax(dim=-1)
            chosen.append(step)
    return [[int(token) for token in row] for row in torch.cat(chosen, dim=1)]


def _torch_logits(model: PreTrainedModel, token_ids: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy(), np.float32)
