"""The gate's first half: does the fp32 graph answer as the model does? Measured with the runtime that ships, never with
a stand-in. `quality` is the second half.

`ask_source` lets torch answer, and `compare_with_source` holds the fp32 graph against these answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.decode import Sequencer
from ..runtime.errors import VerificationError
from ..runtime.manifest import Model
from ..runtime.session import Session
from ..targets import Gate
from .source import cache_argument
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
    """torch's answers to the prompts of `edgelm.export.trials`, and what these prompts could not reach."""

    answers: tuple[SourceAnswer, ...]
    left_out: tuple[str, ...]


def ask_source(model: PreTrainedModel, token_ids: Sequence[int], shape: Model, folder: Path) -> SourceAnswers:
    """Let torch answer the prompts of `edgelm.export.trials`, which says what they are and cost.

    token_ids: the text; shape: context, vocabulary and layers of the graph. The logits are written to the folder and
    mapped from there: a thousand rows of a large vocabulary weigh as much as a model. Raises: VerificationError where
    they are no numbers.
    """
    trials, left_out = make_trials(token_ids, shape, model.config)
    answers = []
    for index, trial in enumerate(trials):
        tokens = _torch_greedy(model, trial, shape.context_length)
        path = folder / f"logits-{index}.npy"
        np.save(path, _require_numbers(_torch_logits(model, trial.prompt + tokens)))
        answers.append(SourceAnswer(trial.prompt, tokens, np.load(path, mmap_mode="r")))
    return SourceAnswers(tuple(answers), left_out)


def compare_with_source(source: SourceAnswers, session: Session, gate: Gate) -> SourceAgreement:
    """Hold greedy tokens and logits of the fp32 graph against torch's answers.

    The graph gets each prompt and its continuation in pieces that are cut in random places. Raises: VerificationError
    outside the tolerance.
    """
    draw = np.random.default_rng(0)
    difference = 0.0
    equal = total = ties = 0
    for answer in source.answers:
        difference = max(difference, _difference(session, answer, draw))
        session.rewind(0)
        tokens = list(Sequencer(session).greedy(answer.prompt, len(answer.tokens), ()))
        same = _equal_steps(answer, tokens, gate)
        equal, total, ties = equal + same, total + len(answer.tokens), ties + (same < len(answer.tokens))
    longest = max(len(answer.prompt) for answer in source.answers)
    result = SourceAgreement(difference, total, equal, ties, len(source.answers), longest, source.left_out)
    if not result.logit_difference <= gate.logit_difference:
        raise VerificationError(
            f"the traced graph's logits are off by {result.logit_difference:.3g} of the largest, the target allows "
            f"{gate.logit_difference:.3g}: this model cannot be exported"
        )
    return result


def _difference(session: Session, answer: SourceAnswer, draw: np.random.Generator) -> float:
    """Largest difference to torch's logits of a text in random pieces, in units of their largest magnitude."""
    session.rewind(0)
    largest = 0.0
    for piece in pieces(answer.prompt + answer.tokens, draw):
        begin = session.length
        got = _require_numbers(session.step(piece, len(piece)))
        largest = max(largest, float(np.abs(got - answer.logits[begin : begin + len(piece)]).max()))
    return largest / float(np.abs(answer.logits).max())


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


def _torch_greedy(model: PreTrainedModel, trial: Trial, context_length: int) -> list[int]:
    """The most likely tokens, as far as the context has room. Not by `generate`: the model's own generation
    configuration may ask for penalties and end tokens, and fills in whatever another one leaves open."""
    import torch

    name = cache_argument(model)
    tokens: list[int] = []
    step, cache = trial.prompt, None
    with torch.no_grad():
        for _ in range(max(1, min(trial.steps, context_length - len(trial.prompt)))):
            output = model(torch.tensor([step]), use_cache=True, **{name: cache})
            cache = getattr(output, name)
            tokens.append(int(output.logits[0, -1].argmax()))
            step = tokens[-1:]
    return tokens


def _torch_logits(model: PreTrainedModel, token_ids: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy(), np.float32)


def lead(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far the first choice is ahead of the second, in probability, for each row."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    top = np.partition(exponentials, -2, axis=1)[:, -2:]
    return np.asarray((top[:, 1] - top[:, 0]) / exponentials.sum(axis=1))
