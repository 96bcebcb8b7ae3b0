"""The gate's first half: check that the fp32 graph answers as the torch model does, in the shipping runtime. `quality`
is the second half.

`ask_source` gets torch's answers, and `compare_with_source` compares the fp32 graph with them.
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
    """The fp32 graph compared with torch.

    logit_difference: largest absolute difference over a prompt and its continuation, in units of torch's largest
    magnitude there, for the worst prompt; steps: greedy steps of torch; equal_steps: steps at which the graph chose the
    same, up to the first different token of each prompt; near_ties: prompts where they differ at a token that torch
    finds equally likely, within the tolerance; prompts, longest_prompt (tokens): what was tried; left_out: limits that
    were not reached.
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
    """Get torch's answers to the prompts of `edgelm.export.gate.trials`, where they and their cost are described.

    token_ids: the text; shape: context, vocabulary and layers of the graph. The logits are written to the folder and
    mapped: a thousand rows of a large vocabulary are as large as a model. Prompts with equal length and steps are
    decoded as one batch, which reads the weights once. The logits come from one pass over each prompt with its answer,
    without a cache. Raises: VerificationError if they are not finite.
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
    """Compare greedy tokens and logits of the fp32 graph with torch's answers.

    1. The graph gets each prompt with torch's answer in random pieces. Every logit is compared, and the most likely
    token at each step of the answer: as long as those are equal, greedy decoding gives them.
    2. The first prompt of each length is also decoded by the runtime's own loop, one token a step. The others would
    only run the same operators and shapes again, and read all weights for each token.

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
    """The number of steps that give torch's token. The first different token must be a near-tie: torch finds it as
    likely as its own, within the tolerance of the logits. Raises: VerificationError."""
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
    """The most likely tokens of each trial, within the context. trials: of equal length and steps, so the batch needs
    no padding. This does not use `generate`: the model's generation configuration may set penalties and end tokens, and
    would fill in what ours leaves open."""
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
